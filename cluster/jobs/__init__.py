"""Jobs other than serving: one file per type of job, and the job executor that runs them."""
