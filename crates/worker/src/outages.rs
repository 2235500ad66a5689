//! A NATS server that is killed may forget its newest deliveries: it counts from one again what it had delivered to
//! another worker. So the delivery count of a message is believed only if the message is newer than the last outage.

use parking_lot::Mutex;
use tokio::sync::watch;

pub struct Outages {
    /// See [`bus::BusApi::interruptions`].
    interruptions: watch::Receiver<u64>,
    /// The interruptions that were noticed, and the stream's time in ms when the last of them was.
    noticed: Mutex<(u64, u64)>,
}

impl Outages {
    pub fn new(interruptions: watch::Receiver<u64>) -> Self {
        Self { interruptions, noticed: Mutex::default() }
    }

    /// Whether a message that was stored then may have been delivered before the last outage.
    pub fn may_have_delivered(&self, stored_ms: u64, now_ms: u64) -> bool {
        let count = *self.interruptions.borrow();
        let mut noticed = self.noticed.lock();
        if noticed.0 != count {
            *noticed = (count, now_ms);
        }
        stored_ms <= noticed.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_after_the_last_outage_are_surely_new() {
        let interruptions = watch::Sender::new(0);
        let outages = Outages::new(interruptions.subscribe());
        assert!(!outages.may_have_delivered(101, 150));

        interruptions.send_replace(1);
        assert!(outages.may_have_delivered(101, 200));
        assert!(outages.may_have_delivered(200, 250));
        assert!(!outages.may_have_delivered(201, 250));
    }
}
