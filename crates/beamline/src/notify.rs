//! What the service manager is told (`sd_notify`), in the words of systemd. Without one nobody hears it.

use sd_notify::NotifyState;
use std::convert::Infallible;
use std::time::Duration;

/// A check of our own that takes longer has failed; less, when the service manager is less patient.
const CHECK_MAX: Duration = Duration::from_secs(5);

pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Until [`ready`] says that it is done.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "no clock to tell the service manager of a reload"),
    }
}

pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("draining")]);
}

pub fn status(text: &str) {
    tell(&[NotifyState::Status(text)]);
}

/// Says that we are alive, at twice the pace that is asked for (`WatchdogSec=`), and only after `alive` has found it so:
/// a process that hangs says nothing and is started anew.
pub async fn watchdog<F: Future<Output = Result<(), String>>>(alive: impl Fn() -> F) -> Infallible {
    let Some(patience) = sd_notify::watchdog_enabled() else {
        return std::future::pending().await;
    };
    beat(patience, alive, || tell(&[NotifyState::Watchdog])).await
}

async fn beat<F: Future<Output = Result<(), String>>>(
    patience: Duration,
    alive: impl Fn() -> F,
    mut tell: impl FnMut(),
) -> Infallible {
    loop {
        match tokio::time::timeout(CHECK_MAX.min(patience / 4), alive())
            .await
            .unwrap_or(Err("no answer".into()))
        {
            Ok(()) => {
                tell();
                tokio::time::sleep(patience / 2).await;
            }
            Err(problem) => {
                tracing::error!(problem, "this process does not serve; the service manager will restart it");
                tokio::time::sleep(patience / 16).await;
            }
        }
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager cannot be told how we do; is $NOTIFY_SOCKET right?");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    #[tokio::test(start_paused = true)]
    async fn it_beats_twice_as_often_as_asked_and_not_while_the_check_fails() {
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
        assert!(checks.get() > beats.borrow().len(), "it looks again soon");
    }
}
