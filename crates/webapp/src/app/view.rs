//! The view of one session. Messages from the page change its state, the page function runs once for a batch of them,
//! and the difference between the old and the new element tree is sent to the page.
//!
//! Sans-IO: [`View::handle`] takes messages and returns the publications.

use super::input::{self, Input};
use super::portions::{portions, whole_tree};
use super::state::{Memory, Snapshot};
use super::ui::{Effects, Ui, Visit};
use super::{App, PageError};
use crate::diff::{Ids, adopt, diff};
use crate::tree::{self, Element, Node};
use serde_json::Value as Json;
use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::time::Instant;
use wire::app::{Body, Deltas, Event, Failure, Navigate, RunFinished, Said, Submit, Toast};

/// Longest path and query of a page together, in bytes.
const PATH_MAX: usize = 1024;

#[derive(Default)]
pub struct View {
    memory: Memory,
    visit: Visit,
    ids: Ids,
    /// The tree that the page holds. `None` if it is unknown; the next run then sends the whole tree.
    tree: Option<Vec<Node>>,
    run: u64,
}

/// The outcome of a batch of messages.
pub struct Handled {
    /// The number of the run, counted from 1.
    pub run: u64,
    /// The publications for the page, in order.
    pub bodies: Vec<Body>,
    /// Why a message was refused; if several were, the last reason.
    pub refused: Option<String>,
}

impl View {
    pub fn restore(snapshot: Snapshot, user: &str, name: String) -> Self {
        let path = match &*snapshot.path {
            "" => "/",
            path => path,
        };
        let visit = Visit {
            user: user.into(),
            name,
            path: path.into(),
            query: snapshot.query.clone(),
            params: Vec::new(),
        };
        Self { visit, memory: Memory::restore(snapshot), ..Self::default() }
    }

    pub fn snapshot(&self) -> Snapshot {
        self.memory.snapshot(&self.visit.path, &self.visit.query)
    }

    /// Records that the page missed a publication, so that the next run sends the whole tree.
    pub fn lost(&mut self) {
        self.tree = None;
    }

    /// Applies the messages and runs the page function once. `session` is for the log.
    pub fn handle(&mut self, app: &App, session: &str, batch: Vec<Said>) -> Handled {
        let mut reset = self.tree.is_none();
        let reports = |said: &Said| matches!(said, Said::Event(_) | Said::Submit(_));
        if reset && batch.iter().any(reports) {
            // A restored session has no tree. Reports are checked against the widgets on the page, so build them first.
            if let Ok((elements, _)) = self.build(app, &HashSet::new()) {
                self.tree = Some(adopt(elements, &mut self.ids));
            }
        }

        let mut refused = None;
        let mut clicked = HashSet::new();
        for said in batch {
            let outcome = match said {
                Said::Event(event) => self.report(&event, &mut clicked),
                Said::Submit(submit) => self.submit(submit, &mut clicked),
                Said::Rerun(rerun) => {
                    reset |= rerun.reset;
                    self.visit(rerun.path, rerun.query)
                }
                // Runs are short: the run to stop has ended before this message is read.
                Said::Stop(_) => Ok(()),
            };
            // The rest of the batch is still processed: its messages are independent of each other.
            refused = outcome.err().or(refused);
        }

        let bodies = self.run(app, session, &clicked, reset);
        Handled { run: self.run, bodies, refused }
    }

    fn visit(&mut self, path: String, query: String) -> Result<(), String> {
        if !path.starts_with('/') || path.len() + query.len() > PATH_MAX {
            return Err(format!("a path begins with a slash and has at most {PATH_MAX} bytes"));
        }
        (self.visit.path, self.visit.query) = (path, query);
        Ok(())
    }

    fn submit(&mut self, submit: Submit, clicked: &mut HashSet<String>) -> Result<(), String> {
        for event in &submit.values {
            self.report(event, clicked)?;
        }
        self.report(&Event { key: submit.form, value: "null".into() }, clicked)
    }

    /// Stores the value that a widget reports, or that it was clicked.
    fn report(&mut self, event: &Event, clicked: &mut HashSet<String>) -> Result<(), String> {
        let Event { key, value } = event;
        let node = self
            .tree
            .as_deref()
            .and_then(|tree| tree::find(tree, key))
            .filter(|_| !key.is_empty());
        let node = node.ok_or_else(|| format!("the page has no widget {key:?} now"))?;

        let value: Json = if value.is_empty() {
            Json::Null
        } else {
            serde_json::from_str(value).map_err(|e| e.to_string())?
        };
        match input::read(node, &value)? {
            Input::Click => drop(clicked.insert(key.clone())),
            Input::Value(value) => drop(self.memory.widgets.insert(key.clone(), value)),
        }
        Ok(())
    }

    fn run(&mut self, app: &App, session: &str, clicked: &HashSet<String>, reset: bool) -> Vec<Body> {
        let started = Instant::now();
        self.run += 1;
        match self.build(app, clicked) {
            Ok((elements, effects)) => {
                let mut bodies = self.show(elements, reset);
                bodies.extend(effects_to_wire(effects));

                let took = started.elapsed();
                metrics::histogram!("beamline_webapp_run_duration_seconds").record(took.as_secs_f64());
                let duration_us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
                bodies.push(Body::RunFinished(RunFinished { duration_us }));
                bodies
            }
            Err(failed) => {
                if reset {
                    // The page holds no tree, and this run does not give it one.
                    self.tree = None;
                }
                vec![Body::Error(self.failure(failed, session))]
            }
        }
    }

    /// Replaces the tree of the page by `elements`. Returns the deltas, or the whole tree if `reset`.
    fn show(&mut self, elements: Vec<Element>, reset: bool) -> Vec<Body> {
        let (nodes, deltas) = match self.tree.take() {
            Some(old) => diff(old, elements, &mut self.ids),
            None => (adopt(elements, &mut self.ids), Vec::new()),
        };
        // Even for a reset the nodes come from a diff, so that they keep their ids.
        let deltas = if reset { whole_tree(&nodes) } else { deltas };

        self.memory.prune(|key| tree::find(&nodes, key).is_some());
        self.tree = Some(nodes);
        portions(deltas)
            .into_iter()
            .map(|delta| Body::Deltas(Deltas { delta }))
            .collect()
    }

    /// Logs a failed run with a new trace id, and returns the message for the page.
    fn failure(&self, failed: Failed, session: &str) -> Failure {
        let trace_id = uuid::Uuid::new_v4().simple().to_string();
        let (message, reason) = match failed {
            Failed::Public(text) => (text.clone(), text),
            Failed::Private(reason) => ("something went wrong on the server; try again".into(), reason),
        };

        tracing::warn!(%trace_id, session, path = self.visit.path, "the page function failed: {reason}");
        metrics::counter!("beamline_webapp_page_errors_total").increment(1);
        Failure { message, trace_id }
    }

    /// Runs the page function for the session's path. A panic becomes an error.
    fn build(&mut self, app: &App, clicked: &HashSet<String>) -> Result<(Vec<Element>, Effects), Failed> {
        let (page, params) = match app.find(&self.visit.path) {
            Some((page, params)) => (Some(page), params),
            None => (None, Vec::new()),
        };
        self.visit.params = params;

        let Self { memory, visit, .. } = self;
        // The session continues after a panic: the locks in its state cannot be poisoned.
        let built = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let mut ui = Ui::new(app, visit, memory, clicked);
            match page {
                Some(page) => page(&mut ui),
                None => not_found(&mut ui),
            }
            .map_err(|error| Failed::from_page(&error))?;
            ui.finish().map_err(Failed::Public)
        }));

        built.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            Err(Failed::Private(format!("panic: {}", text.unwrap_or_else(|| "(no message)".into()))))
        })
    }
}

fn effects_to_wire(effects: Effects) -> Vec<Body> {
    let toast = |(tone, text): (super::Tone, String)| Body::Toast(Toast { tone: tone.as_str().into(), text });
    let mut bodies: Vec<Body> = effects.toasts.into_iter().map(toast).collect();
    if let Some(place) = effects.navigate {
        let (path, query) = place.split_once('?').unwrap_or((&place, ""));
        bodies.push(Body::Navigate(Navigate { path: path.into(), query: query.into() }));
    }
    bodies
}

fn not_found(ui: &mut Ui<'_>) -> Result<(), PageError> {
    ui.page("Not found", |ui| {
        ui.empty("There is nothing here", "The link may be old, or mistyped.");
        ui.link("/", "To the start");
    });
    Ok(())
}

/// Why a run failed.
#[derive(Debug, PartialEq)]
enum Failed {
    /// The text may be shown on the page.
    Public(String),
    /// The text is for the log only: it may name tables, servers or code.
    Private(String),
}

impl Failed {
    /// An error is private if the database is anywhere among its sources.
    fn from_page(error: &PageError) -> Self {
        let mut sources =
            std::iter::successors(Some(&**error as &(dyn std::error::Error + 'static)), |error| error.source());
        match sources.any(|error| error.is::<crate::db::Error>() || error.is::<sqlx::Error>()) {
            true => Self::Private(error.to_string()),
            false => Self::Public(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::Db;

    #[tokio::test]
    async fn database_errors_of_a_page_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(None, dir.path()).await.unwrap();
        let refused = async || {
            sqlx::query("SELECT secret FROM nowhere")
                .execute(db.read())
                .await
                .unwrap_err()
        };
        let (plain, wrapped) = (refused().await, crate::db::Error::from(refused().await));

        let errors: Vec<PageError> = vec![plain.into(), wrapped.into()];
        for error in errors {
            assert!(matches!(Failed::from_page(&error), Failed::Private(reason) if reason.contains("nowhere")));
        }
        let public: PageError = "the report is not there yet".into();
        assert_eq!(Failed::from_page(&public), Failed::Public("the report is not there yet".into()));
    }

    fn view_of_root() -> View {
        View::restore(Snapshot::default(), "ann", "Ann".into())
    }

    #[test]
    fn page_navigates_within_the_app_only() {
        let build = |place: &'static str, link: &'static str| {
            let app = App::new().page("/", move |ui| {
                ui.link(link, "there");
                ui.navigate(place);
                Ok(())
            });
            let built = view_of_root().build(&app, &HashSet::new());
            built.map(|(_, effects)| effects.navigate.unwrap())
        };

        assert_eq!(build("/console?tab=1", "https://other.example").unwrap(), "/console?tab=1");
        for (place, link) in
            [("/\\evil.example", "/"), ("//evil.example", "/"), ("/", "javascript:alert(1)"), ("/", "/\t/x")]
        {
            assert!(matches!(build(place, link), Err(Failed::Public(_))), "{place} {link}");
        }
    }

    #[test]
    fn panic_of_a_page_is_private() {
        let app = App::new().page("/", |_| panic!("column \"secret\""));
        let built = view_of_root().build(&app, &HashSet::new());
        assert!(matches!(built, Err(Failed::Private(_))));
    }
}
