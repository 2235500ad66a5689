//! The assignments that this worker runs or whose result it stores, for counting and cancelling, and so that none runs
//! twice here at the same time.

use parking_lot::Mutex;
use std::collections::HashMap;
use tokio_util::sync::{CancellationToken, DropGuard};
use wire::router::{CancelRun, ExecAssignment};

#[derive(Default)]
pub struct Running(Mutex<HashMap<String, Entry>>);

struct Entry {
    tenant_id: String,
    request_id: String,
    stop: CancellationToken,
    /// Cancelled when the entry is removed.
    gone: CancellationToken,
    /// The run has ended, and its result is being stored.
    ended: bool,
}

/// One assignment in the table; dropping it removes it.
pub struct Run<'a> {
    running: &'a Running,
    assignment_id: String,
    pub stop: CancellationToken,
    _gone: DropGuard,
}

impl Running {
    /// Runs that have not ended.
    pub fn count(&self) -> usize {
        self.0.lock().values().filter(|entry| !entry.ended).count()
    }

    /// Adds the assignment. If it is in the table already, returns what is cancelled once it is not.
    pub fn start(&self, assignment: &ExecAssignment) -> Result<Run<'_>, CancellationToken> {
        let mut table = self.0.lock();
        if let Some(entry) = table.get(&assignment.assignment_id) {
            return Err(entry.gone.clone());
        }

        let (stop, gone) = (CancellationToken::new(), CancellationToken::new());
        let entry = Entry {
            tenant_id: assignment.tenant_id.clone(),
            request_id: assignment.request_id.clone(),
            stop: stop.clone(),
            gone: gone.clone(),
            ended: false,
        };
        table.insert(assignment.assignment_id.clone(), entry);
        Ok(Run {
            running: self,
            assignment_id: assignment.assignment_id.clone(),
            stop,
            _gone: gone.drop_guard(),
        })
    }

    pub fn cancel(&self, cancel: &CancelRun) {
        for (assignment_id, run) in self.0.lock().iter() {
            if cancel.is_for(&run.tenant_id, &run.request_id, assignment_id) {
                run.stop.cancel();
            }
        }
    }
}

impl Run<'_> {
    /// The run has ended: it does not count any more.
    pub fn ended(&self) {
        if let Some(entry) = self.running.0.lock().get_mut(&self.assignment_id) {
            entry.ended = true;
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.running.0.lock().remove(&self.assignment_id);
    }
}
