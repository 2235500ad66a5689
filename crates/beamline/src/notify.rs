//! Notifications to the service manager (`sd_notify`). Without a service manager they do nothing.

use sd_notify::NotifyState;
use std::convert::Infallible;
use std::time::Duration;

/// A self-check that takes longer counts as failed. A short `WatchdogSec=` lowers this limit.
const CHECK_MAX: Duration = Duration::from_secs(5);

pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Reports a reload, which lasts until [`ready`] is called.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "cannot read the clock to report a reload to the service manager"),
    }
}

pub fn stopping() {
    send(&[NotifyState::Stopping, NotifyState::Status("draining")]);
}

pub fn status(text: &str) {
    send(&[NotifyState::Status(text)]);
}

/// Reports twice per `WatchdogSec=` that the process is alive, each time after `self_check` has passed. The service
/// manager restarts a process that stops reporting.
pub async fn watchdog<F: Future<Output = Result<(), String>>>(alive: impl Fn() -> F) -> Infallible {
    let Some(patience) = sd_notify::watchdog_enabled() else {
        return std::future::pending().await;
    };
    beat(patience, alive, || send(&[NotifyState::Watchdog])).await
}

async fn beat<F: Future<Output = Result<(), String>>>(
    patience: Duration,
    alive: impl Fn() -> F,
    mut send_beat: impl FnMut(),
) -> Infallible {
    loop {
        match tokio::time::timeout(CHECK_MAX.min(patience / 4), alive())
            .await
            .unwrap_or(Err("no answer".into()))
        {
            Ok(()) => {
                send_beat();
                tokio::time::sleep(patience / 2).await;
            }
            Err(problem) => {
                tracing::error!(
                    problem,
                    "the self-check failed; the service manager restarts this process unless it recovers"
                );
                tokio::time::sleep(patience / 16).await;
            }
        }
    }
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot notify the service manager; is $NOTIFY_SOCKET right?");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    #[tokio::test(start_paused = true)]
    async fn watchdog_beats_twice_per_period_and_stops_while_the_check_fails() {
        let start = tokio::time::Instant::now();
        let seconds = || start.elapsed().as_secs();
        let beats = RefCell::new(Vec::new());
        let checks = Cell::new(0);
        let alive = async || {
            checks.set(checks.get() + 1);
            match seconds() {
                60..80 => Err("broken".into()),
                120..140 => std::future::pending().await,
                _ => Ok(()),
            }
        };
        let beating = beat(Duration::from_secs(32), &alive, || beats.borrow_mut().push(seconds()));
        let _ = tokio::time::timeout(Duration::from_secs(185), beating).await;
        assert_eq!(*beats.borrow(), [0, 16, 32, 48, 80, 96, 112, 142, 158, 174]);
        assert!(checks.get() > beats.borrow().len(), "a failed check is repeated soon");
    }
}
