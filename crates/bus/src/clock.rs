//! The wall clock, as messages, records and tokens carry it. Deadlines within one process use `Instant` instead.

use crate::{Bus, Result};
use parking_lot::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch; 0 if the clock is set before it.
pub fn unix_ms() -> u64 {
    u64::try_from(since_epoch().as_millis()).unwrap_or(u64::MAX)
}

/// Whole seconds since the Unix epoch; 0 if the clock is set before it.
pub fn unix_seconds() -> u64 {
    since_epoch().as_secs()
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The clock that stamps the messages of a stream, read now and then and advanced by this process's monotonic clock in
/// between. So it matters neither that this host's clock differs from the bus's, nor that it jumps.
pub struct StreamClock {
    bus: Bus,
    stream: &'static str,
    read: Mutex<(u64, Instant)>,
}

impl StreamClock {
    pub async fn start(bus: Bus, stream: &'static str) -> Result<Self> {
        let read = (bus.time_ms(stream).await?, Instant::now());
        Ok(Self { bus, stream, read: Mutex::new(read) })
    }

    /// Reads the clock again.
    pub async fn sync(&self) -> Result<()> {
        let time = self.bus.time_ms(self.stream).await?;
        self.set(time);
        Ok(())
    }

    /// Takes this as the time of the clock now, in milliseconds since the Unix epoch.
    pub fn set(&self, time_ms: u64) {
        *self.read.lock() = (time_ms, Instant::now());
    }

    /// Milliseconds since the Unix epoch.
    pub fn now_ms(&self) -> u64 {
        let (time, at) = *self.read.lock();
        time.saturating_add(u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}
