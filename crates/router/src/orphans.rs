//! Takes over the assignments of a provider whose workers are all gone: moves them to the common subject, where workers
//! of other versions listen, and where those that nobody can run fail at their deadline.

use crate::Router;
use bus::assignments::{consumer, move_to, subject_of};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::router::ExecAssignment;
use wire::subjects::{ASSIGN, STREAM_ASSIGN};

const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Assignments that are moved at the same time.
const MOVES_MAX: usize = 64;
/// A subject without a message for this long is empty, as far as can be taken now.
const EMPTY_AFTER: Duration = Duration::from_secs(1);

pub async fn run(router: Arc<Router>, cancel: CancellationToken) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    let mut unused = Unused::default();
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }

        if let Err(error) = look(&router, &mut unused, &cancel).await {
            tracing::debug!(%error, "cannot look for assignments whose workers are gone");
        }
    }
}

/// Since when this router has seen neither an assignment nor a live worker on a provider's subject, by consumer.
type Unused = HashMap<String, Instant>;

/// Takes over every provider's subject that has assignments and no live worker, and retires those that have neither.
async fn look(router: &Router, unused: &mut Unused, cancel: &CancellationToken) -> bus::Result<()> {
    // A router that has just started does not know who is live.
    if !router.fleet.is_known(Instant::now()) {
        return Ok(());
    }
    let mut still_unused = Unused::new();
    for (name, backlog) in router.bus.stream_info(STREAM_ASSIGN).await?.consumers {
        let Some(subject) = subject_of(&name).filter(|subject| is_orphaned(router, subject)) else {
            continue;
        };
        if backlog > 0 {
            tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                moved = take_over(router, &subject) => moved?,
            }
            continue;
        }

        let since = unused.get(&name).copied().unwrap_or_else(Instant::now);
        if since.elapsed() >= router.config.retire_after && router.bus.retire(STREAM_ASSIGN, &name).await? {
            tracing::info!(subject, "no worker has taken from this subject for long; it and its consumer were deleted");
        } else {
            still_unused.insert(name, since);
        }
    }
    *unused = still_unused;
    Ok(())
}

fn is_orphaned(router: &Router, subject: &str) -> bool {
    !router.fleet.listens(subject, Instant::now())
}

/// Moves what can be taken from the subject, until a worker listens again. What its last worker held comes when the ack
/// wait of that is over.
async fn take_over(router: &Router, subject: &str) -> bus::Result<()> {
    let mut consumer = router.bus.consume(consumer(subject, MOVES_MAX)).await?;
    let mut moved = 0_u64;
    while is_orphaned(router, subject)
        && let Ok(Some(delivery)) = tokio::time::timeout(EMPTY_AFTER, consumer.next()).await
    {
        let done = match serde_json::from_slice::<ExecAssignment>(&delivery.message.payload) {
            Ok(assignment) => move_to(&router.bus, &delivery, &assignment, ASSIGN).await,
            Err(error) => {
                let reason = format!("the assignment cannot be read: {}", wire::unfit(&error));
                bus::dead_letter::bury_unreadable(&router.bus, &delivery, &reason).await
            }
        };
        if let Err(error) = done {
            tracing::warn!(%error, subject, "cannot move an assignment; the stream redelivers it");
        }
        moved += 1;
    }
    consumer.close().await;

    if moved > 0 {
        tracing::warn!(
            subject,
            moved,
            "no live worker takes from this subject; its assignments were moved to {ASSIGN}"
        );
    }
    Ok(())
}
