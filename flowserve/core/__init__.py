"""Host logic of one engine, the same objects in the simulator and on devices: scheduler, RTC, transfers, TE-shell."""
