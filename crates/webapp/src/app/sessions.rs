//! Sessions of pages: takes what a page says (RPC `app.event`), runs its page function, publishes the difference.
//!
//! A session is in the memory of one web app, its owner, whose name is in the database; the others hand calls on to it,
//! and take the session over when it does not answer.

use super::input::{self, Input};
use super::state::{Memory, Snapshot};
use super::ui::{Effects, Ui, Visit};
use super::{App, PageError};
use crate::accounts::Accounts;
use crate::channels::Channels;
use crate::db::{Db, now_ms};
use crate::diff::{Ids, adopt, diff};
use crate::rpc::{self, Caller, Refusal};
use crate::tree::{self, Node};
use bus::Bus;
use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message as _;
use serde_json::Value as Json;
use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::app::{
    Back, Body, Delta, Deltas, Failure, Forward, Insert, Navigate, Node as WireNode, Op, Reset, RunFinished, Said,
    Toast,
};
use wire::realtime::ErrorCode;

/// Sessions in memory; beyond it the one that was quiet the longest is put away.
const SESSIONS_MAX: usize = 10_000;
/// A session that was quiet for this long is put away.
const IDLE_MAX: Duration = Duration::from_secs(30 * 60);
/// A session put away can be gone on with for this long.
const KEPT: Duration = Duration::from_secs(7 * 86_400);
/// Interactions of one session that wait for its run.
const PENDING_MAX: usize = 64;
/// Changed sessions are written this often.
const SAVE_EVERY: Duration = Duration::from_millis(500);
/// A session that remembers more is not kept over a restart.
const SNAPSHOT_MAX: usize = 256 * 1024;
/// Deltas of one publication, about.
const FORWARD_MAX: usize = 256 * 1024;
const PATH_MAX: usize = 1024;
/// Sessions of one user that are kept; beyond it the oldest go.
const KEPT_PER_USER: i64 = 100;
/// A session's owner answers within, or loses it.
const OWNER_TIMEOUT: Duration = Duration::from_secs(3);
/// A session's owner takes here what others hand on.
const OWNER_PREFIX: &str = "beamline.webapp.v1.session.";
/// A call that another web app hands on.
pub const HANDED_ON: &str = "handed on";

pub struct Sessions {
    /// Our name as an owner; no other web app has it.
    name: String,
    app: App,
    bus: Bus,
    db: Db,
    channels: Channels,
    accounts: Arc<Accounts>,
    live: Mutex<HashMap<String, Arc<Session>>>,
}

enum Place {
    Here(Arc<Session>),
    /// In the memory of the web app of this name.
    At(String),
}

#[derive(sqlx::FromRow)]
struct Stored {
    #[sqlx(rename = "user_id")]
    user: String,
    owner: String,
    snapshot: String,
}

struct Session {
    id: String,
    user: String,
    /// What the page said and no run has seen.
    pending: Mutex<VecDeque<Said>>,
    core: tokio::sync::Mutex<Core>,
    touched: Mutex<Instant>,
    changed: AtomicBool,
}

#[derive(Default)]
struct Core {
    memory: Memory,
    visit: Visit,
    ids: Ids,
    /// As the page holds it; none when the page holds nothing that we know.
    tree: Option<Vec<Node>>,
    run: u64,
}

impl Sessions {
    pub fn new(app: App, db: Db, bus: Bus, channels: Channels, accounts: Arc<Accounts>) -> Self {
        let name = uuid::Uuid::new_v4().simple().to_string();
        Self { name, app, db, bus, channels, accounts, live: Mutex::default() }
    }

    /// Where others hand on calls to.
    pub fn subject(&self) -> String {
        owner_subject(&self.name)
    }

    /// One message of a page; answered once a run has seen it.
    pub async fn handle(&self, caller: &Caller, payload: Bytes, handed_on: bool) -> Result<Bytes, Refusal> {
        let bad = |text: String| Refusal(ErrorCode::BadRequest, text);
        let back = Back::decode(payload.clone()).map_err(|e| bad(format!("not a message of a page: {e}")))?;
        if back.version == 0 {
            return Err(bad("a message of a page has a version of 1 or more".into()));
        }
        let fits = (16..=64).contains(&back.session.len()) && back.session.bytes().all(|b| b.is_ascii_hexdigit());
        if !fits {
            return Err(bad("a session's id has 16 to 64 hexadecimal digits".into()));
        }
        // A newer page may say what this version does not know.
        let Some(said) = back.body else { return Ok(Bytes::new()) };
        let session = match self.session(&back.session, &caller.user).await? {
            Place::Here(session) => session,
            Place::At(_) if handed_on => return Err(Refusal::again("the session has moved; try again")),
            Place::At(owner) => {
                match rpc::hand_on(&self.bus, &owner_subject(&owner), caller, payload, OWNER_TIMEOUT).await {
                    Ok(answer) => return answer,
                    Err(error) => {
                        tracing::info!(session = back.session, owner, %error, "taking a session over");
                        let taken = self.take(&back.session, &owner).await;
                        taken.map_err(|error| Refusal::internal("a session cannot be taken over", error))?;
                        match self.session(&back.session, &caller.user).await? {
                            Place::Here(session) => session,
                            Place::At(_) => return Err(Refusal::again("the session has moved; try again")),
                        }
                    }
                }
            }
        };
        {
            let mut pending = session.pending.lock();
            if pending.len() >= PENDING_MAX {
                return Err(Refusal(ErrorCode::TooManyRequests, "too many interactions wait for this page".into()));
            }
            pending.push_back(said);
        }
        let mut core = session.core.lock().await;
        let batch: Vec<Said> = session.pending.lock().drain(..).collect();
        if batch.is_empty() {
            // The run before this one has seen it.
            return Ok(Bytes::new());
        }
        let refused = self.interact(&session, &mut core, batch).await;
        session.changed.store(true, Relaxed);
        refused.map_or(Ok(Bytes::new()), |text| Err(bad(text)))
    }

    async fn session(&self, id: &str, user: &str) -> Result<Place, Refusal> {
        let foreign = || Refusal(ErrorCode::PermissionDenied, "this session is another user's".into());
        if let Some(session) = self.live.lock().get(id) {
            // While it cannot be put away.
            *session.touched.lock() = Instant::now();
            return if session.user == user {
                Ok(Place::Here(session.clone()))
            } else {
                Err(foreign())
            };
        }
        let internal = |error: crate::db::Error| Refusal::internal("a session cannot be read", error);
        let stored = self.stored(id, user).await.map_err(internal)?;
        if stored.user != user {
            return Err(foreign());
        }
        if stored.owner != self.name && !(stored.owner.is_empty() && self.take(id, "").await.map_err(internal)?) {
            return Ok(Place::At(stored.owner));
        }
        // One of another version starts anew.
        let snapshot: Snapshot = serde_json::from_str(&stored.snapshot).unwrap_or_default();
        let mut core = Core::default();
        (core.visit.path, core.visit.query) = (snapshot.path.clone(), snapshot.query.clone());
        core.memory = Memory::restore(snapshot);
        core.visit.user = user.into();
        core.visit.name = self.accounts.name(user).await;
        if core.visit.path.is_empty() {
            core.visit.path = "/".into();
        }
        let fresh = Arc::new(Session {
            id: id.into(),
            user: user.into(),
            pending: Mutex::default(),
            core: core.into(),
            touched: Mutex::new(Instant::now()),
            changed: AtomicBool::new(false),
        });
        let mut live = self.live.lock();
        if live.len() >= SESSIONS_MAX {
            let oldest = live
                .values()
                .filter(|s| !s.changed.load(Relaxed))
                .min_by_key(|s| *s.touched.lock());
            if let Some(oldest) = oldest.map(|session| session.id.clone()) {
                live.remove(&oldest);
            }
        }
        let session = live.entry(id.into()).or_insert(fresh).clone();
        metrics::gauge!("beamline_webapp_sessions").set(live.len() as f64);
        if session.user == user {
            Ok(Place::Here(session))
        } else {
            Err(foreign())
        }
    }

    /// As the database has it; ours from now on if it had none.
    async fn stored(&self, id: &str, user: &str) -> crate::db::Result<Stored> {
        let insert = "INSERT INTO app_sessions (id, user_id, owner, snapshot, updated_at) VALUES ($1, $2, $3, '', $4)
            ON CONFLICT (id) DO NOTHING";
        let select = || sqlx::query_as("SELECT user_id, owner, snapshot FROM app_sessions WHERE id = $1").bind(id);
        if let Some(stored) = select().fetch_optional(self.db.read()).await? {
            return Ok(stored);
        }
        let insert = sqlx::query(insert).bind(id).bind(user).bind(&self.name).bind(now_ms());
        insert.execute(self.db.write()).await?;
        Ok(select().fetch_one(self.db.read()).await?)
    }

    /// Makes a session ours; false if its owner is no longer who it was.
    async fn take(&self, id: &str, owner: &str) -> crate::db::Result<bool> {
        let update = sqlx::query("UPDATE app_sessions SET owner = $1 WHERE id = $2 AND owner = $3");
        let update = update.bind(&self.name).bind(id).bind(owner);
        Ok(update.execute(self.db.write()).await?.rows_affected() == 1)
    }

    /// Applies what was said, runs, publishes. Why something was refused, if something was.
    async fn interact(&self, session: &Session, core: &mut Core, batch: Vec<Said>) -> Option<String> {
        let mut refused = None;
        let mut clicked = HashSet::new();
        let mut reset = core.tree.is_none();
        if reset
            && batch
                .iter()
                .any(|said| matches!(said, Said::Event(_) | Said::Submit(_)))
        {
            // Restored: what widgets there are shows a run that nobody sees.
            if let Ok((elements, _)) = run(&self.app, core, &HashSet::new()) {
                core.tree = Some(adopt(elements, &mut core.ids));
            }
        }
        for said in batch {
            let outcome = match said {
                Said::Event(event) => report(core, &event.key, &event.value, &mut clicked),
                Said::Submit(submit) => {
                    let reported = submit
                        .values
                        .iter()
                        .map(|event| report(core, &event.key, &event.value, &mut clicked));
                    let reported = reported.collect::<Result<Vec<()>, String>>().map(|_| ());
                    reported.and_then(|()| report(core, &submit.form, "null", &mut clicked))
                }
                Said::Rerun(rerun) => {
                    reset |= rerun.reset;
                    let fits = rerun.path.starts_with('/') && rerun.path.len() + rerun.query.len() <= PATH_MAX;
                    if fits {
                        (core.visit.path, core.visit.query) = (rerun.path, rerun.query);
                        Ok(())
                    } else {
                        Err(format!("a path begins with a slash and has at most {PATH_MAX} bytes"))
                    }
                }
                // Runs are short: the one that was going on has ended before this was read.
                Said::Stop(_) => Ok(()),
            };
            refused = outcome.err().or(refused);
        }
        self.run_and_publish(session, core, &clicked, reset).await;
        refused
    }

    async fn run_and_publish(&self, session: &Session, core: &mut Core, clicked: &HashSet<String>, reset: bool) {
        let started = Instant::now();
        core.run += 1;
        let number = core.run;
        let mut out = Vec::new();
        match run(&self.app, core, clicked) {
            Ok((elements, effects)) => {
                let (nodes, deltas) = match core.tree.take() {
                    Some(old) => diff(old, elements, &mut core.ids),
                    None => (adopt(elements, &mut core.ids), Vec::new()),
                };
                let deltas = if reset { whole(&nodes) } else { deltas };
                out.extend(parts(deltas).into_iter().map(|delta| Body::Deltas(Deltas { delta })));
                out.extend(
                    effects
                        .toasts
                        .into_iter()
                        .map(|(tone, text)| Body::Toast(Toast { tone: tone.as_str().into(), text })),
                );
                if let Some(place) = effects.navigate {
                    let (path, query) = place.split_once('?').unwrap_or((&place, ""));
                    out.push(Body::Navigate(Navigate { path: path.into(), query: query.into() }));
                }
                core.memory.prune(|key| tree::find(&nodes, key).is_some());
                core.tree = Some(nodes);
                let took = started.elapsed();
                metrics::histogram!("beamline_webapp_run_duration_seconds").record(took.as_secs_f64());
                out.push(Body::RunFinished(RunFinished {
                    duration_us: u32::try_from(took.as_micros()).unwrap_or(u32::MAX),
                }));
            }
            Err(failed) => {
                let trace_id = uuid::Uuid::new_v4().simple().to_string();
                let (message, reason) = match failed {
                    Failed::Told(text) => (text.clone(), text),
                    Failed::Ours(reason) => ("something went wrong on the server; try again".into(), reason),
                };
                tracing::warn!(%trace_id, session = session.id, path = core.visit.path, "a page failed: {reason}");
                metrics::counter!("beamline_webapp_page_errors_total").increment(1);
                out.push(Body::Error(Failure { message, trace_id }));
                if reset {
                    // The page holds nothing, and it still does not.
                    core.tree = None;
                }
            }
        }
        let channel = format!("app:{}#{}", session.id, session.user);
        for body in out {
            let data = Forward::new(number, body).encode_to_vec();
            if let Err(error) = self.channels.publish_bytes(&channel, &data).await {
                tracing::warn!(session = session.id, "what a page shows was not published: {error}");
                // The page has missed something: the next run sends everything.
                core.tree = None;
                return;
            }
        }
    }

    /// Writes changed sessions and puts quiet ones away, until cancelled.
    pub async fn keep(&self, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(SAVE_EVERY);
        let mut rounds = 0u32;
        loop {
            let last = tokio::select! {
                () = cancel.cancelled() => true,
                _ = ticks.tick() => false,
            };
            if let Err(error) = self.save().await {
                tracing::warn!("sessions of pages were not written; trying again: {error}");
            }
            if last {
                let release = sqlx::query("UPDATE app_sessions SET owner = '' WHERE owner = $1").bind(&self.name);
                if let Err(error) = release.execute(self.db.write()).await {
                    tracing::warn!("sessions of pages were not given up; others take them over: {error}");
                }
                return;
            }
            rounds = rounds.wrapping_add(1);
            if rounds % 120 == 1 {
                self.put_away().await;
            }
        }
    }

    async fn save(&self) -> crate::db::Result<()> {
        let changed: Vec<Arc<Session>> = {
            let live = self.live.lock();
            live.values()
                .filter(|session| session.changed.swap(false, Relaxed))
                .cloned()
                .collect()
        };
        if changed.is_empty() {
            return Ok(());
        }
        let saved = self.save_all(&changed).await;
        if saved.is_err() {
            changed.iter().for_each(|session| session.changed.store(true, Relaxed));
        }
        saved
    }

    async fn save_all(&self, sessions: &[Arc<Session>]) -> crate::db::Result<()> {
        let mut snapshots = Vec::with_capacity(sessions.len());
        for session in sessions {
            // One that is busy, perhaps for long, is written the next time.
            let Ok(core) = session.core.try_lock() else {
                session.changed.store(true, Relaxed);
                continue;
            };
            let snapshot = core.memory.snapshot(&core.visit.path, &core.visit.query);
            let snapshot = serde_json::to_string(&snapshot).unwrap_or_default();
            if snapshot.len() > SNAPSHOT_MAX {
                tracing::warn!(session = session.id, bytes = snapshot.len(), "a session remembers too much to be kept");
                continue;
            }
            snapshots.push((session, snapshot));
        }
        let mut tx = self.db.begin().await?;
        let mut lost = Vec::new();
        for (session, snapshot) in snapshots {
            let update = "UPDATE app_sessions SET snapshot = $1, updated_at = $2 WHERE id = $3 AND owner = $4";
            let update = sqlx::query(update)
                .bind(snapshot)
                .bind(now_ms())
                .bind(&session.id)
                .bind(&self.name);
            if update.execute(&mut *tx).await?.rows_affected() == 0 {
                lost.push(session);
            }
        }
        tx.commit().await?;
        // Another web app has taken them over, or they are no longer kept.
        let mut live = self.live.lock();
        for session in lost {
            live.remove(&session.id);
        }
        Ok(())
    }

    async fn put_away(&self) {
        self.live
            .lock()
            .retain(|_, session| session.changed.load(Relaxed) || session.touched.lock().elapsed() < IDLE_MAX);
        let before = now_ms() - i64::try_from(KEPT.as_millis()).unwrap_or(i64::MAX);
        // Anybody who is signed in can begin sessions without end.
        let delete = "DELETE FROM app_sessions WHERE updated_at < $1 OR id IN (SELECT id FROM (
            SELECT id, ROW_NUMBER() OVER (PARTITION BY user_id ORDER BY updated_at DESC) AS place FROM app_sessions
            ) ranked WHERE place > $2)";
        let delete = sqlx::query(delete).bind(before).bind(KEPT_PER_USER);
        if let Err(error) = delete.execute(self.db.write()).await {
            tracing::warn!("old sessions of pages were not removed: {error}");
        }
    }
}

fn owner_subject(name: &str) -> String {
    format!("{OWNER_PREFIX}{name}")
}

/// Notes what a widget reports.
fn report(core: &mut Core, key: &str, value: &str, clicked: &mut HashSet<String>) -> Result<(), String> {
    let node = core
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
        Input::Click => drop(clicked.insert(key.to_string())),
        Input::Value(value) => drop(core.memory.widgets.insert(key.to_string(), value)),
    }
    Ok(())
}

/// Why a run failed.
#[derive(Debug, PartialEq)]
enum Failed {
    /// In words for the person at the page.
    Told(String),
    /// For the log: names of tables, servers or code are nothing for a page.
    Ours(String),
}

impl Failed {
    fn of(error: &PageError) -> Self {
        let mut sources =
            std::iter::successors(Some(&**error as &(dyn std::error::Error + 'static)), |error| error.source());
        match sources.any(|error| error.is::<crate::db::Error>() || error.is::<sqlx::Error>()) {
            true => Self::Ours(error.to_string()),
            false => Self::Told(error.to_string()),
        }
    }
}

/// One run of the page at the session's place. A panic is an error like any other.
fn run(app: &App, core: &mut Core, clicked: &HashSet<String>) -> Result<(Vec<tree::Element>, Effects), Failed> {
    let found = app.find(&core.visit.path);
    let (page, params) = match found {
        Some((page, params)) => (Some(page), params),
        None => (None, Vec::new()),
    };
    core.visit.params = params;
    let Core { memory, visit, .. } = core;
    let built = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let mut ui = Ui::new(app, visit, memory, clicked);
        match page {
            Some(page) => page(&mut ui),
            None => nothing_here(&mut ui),
        }
        .map_err(|error| Failed::of(&error))?;
        ui.finish().map_err(Failed::Told)
    }));
    built.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Err(Failed::Ours(format!("it panicked: {}", text.unwrap_or_else(|| "without a word".into()))))
    })
}

fn nothing_here(ui: &mut Ui<'_>) -> Result<(), PageError> {
    ui.page("Not found", |ui| {
        ui.empty("There is nothing here", "The link may be old, or mistyped.");
        ui.link("/", "To the start");
    });
    Ok(())
}

/// The whole tree as one delta.
fn whole(nodes: &[Node]) -> Vec<Delta> {
    let children = nodes.iter().map(Node::to_wire).collect();
    vec![Delta { op: Some(Op::Reset(Reset { children, title: String::new() })) }]
}

/// In portions that fit a publication each. What is too large by itself comes as itself, then its children.
fn parts(deltas: Vec<Delta>) -> Vec<Vec<Delta>> {
    let mut parts = Vec::new();
    let mut part = Vec::new();
    let mut size = 0;
    let mut rest: VecDeque<Delta> = deltas.into();
    while let Some(delta) = rest.pop_front() {
        let length = delta.encoded_len();
        if length > FORWARD_MAX
            && let Some(smaller) = split(&delta)
        {
            smaller.into_iter().rev().for_each(|delta| rest.push_front(delta));
            continue;
        }
        if size + length > FORWARD_MAX && !part.is_empty() {
            parts.push(std::mem::take(&mut part));
            size = 0;
        }
        size += length;
        part.push(delta);
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}

/// A node, then its children one by one; nothing if it has none.
fn split(delta: &Delta) -> Option<Vec<Delta>> {
    let children = |parent: u64, children: &[WireNode]| -> Vec<Delta> {
        let insert = |(index, node): (usize, &WireNode)| Insert {
            parent,
            index: u32::try_from(index).unwrap_or(u32::MAX),
            node: Some(node.clone()),
        };
        children
            .iter()
            .enumerate()
            .map(insert)
            .map(|insert| Delta { op: Some(Op::Insert(insert)) })
            .collect()
    };
    let (first, rest) = match delta.op.as_ref()? {
        Op::Reset(reset) => {
            (Op::Reset(Reset { children: Vec::new(), title: reset.title.clone() }), children(0, &reset.children))
        }
        Op::Insert(insert) => {
            let node = insert.node.as_ref()?;
            let bare = WireNode { children: Vec::new(), ..node.clone() };
            (Op::Insert(Insert { node: Some(bare), ..insert.clone() }), children(node.id, &node.children))
        }
        _ => return None,
    };
    if rest.is_empty() {
        return None;
    }
    Some(std::iter::once(Delta { op: Some(first) }).chain(rest).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Element;
    use base64::Engine as _;
    use wire::channels::{Answer, Position, Publish};

    const ID: &str = "00112233445566778899aabbccddeeff";

    async fn said(sessions: &Sessions, bus: &Bus, path: &str, reset: bool) -> Body {
        let rerun = Said::Rerun(wire::app::Rerun { path: path.into(), query: String::new(), reset });
        let back = Back { version: 1, session: ID.into(), body: Some(rerun) }.encode_to_vec();
        let mut node = bus.subscribe(wire::subjects::CHANNELS_PUBLISH, None, 16).await.unwrap();
        let caller = Caller { user: "ann".into() };
        let mut handled = std::pin::pin!(sessions.handle(&caller, back.into(), false));
        let mut first = None;
        loop {
            tokio::select! {
                done = handled.as_mut() => {
                    done.map_err(|refusal| refusal.1).unwrap();
                    return first.unwrap();
                }
                Some(request) = node.next() => {
                    let publish: Publish = serde_json::from_slice(&request.payload).unwrap();
                    let data = base64::engine::general_purpose::STANDARD.decode(publish.b64.unwrap()).unwrap();
                    first = first.or(Forward::decode(&*data).unwrap().body);
                    let payload = serde_json::to_vec(&Answer::success(Position::default())).unwrap().into();
                    let reply = bus::Message { subject: request.reply.unwrap(), payload, ..bus::Message::default() };
                    bus.publish(reply).await.unwrap();
                }
            }
        }
    }

    #[tokio::test]
    async fn a_page_that_lost_its_tree_gets_it_whole_though_a_run_failed_between() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let db = Db::open(None, dir.path()).await.unwrap();
        let app = App::new()
            .page("/", |ui| {
                ui.text("hello");
                Ok(())
            })
            .page("/broken", |_| Err("it is broken".into()));
        let accounts = Arc::new(Accounts::new(db.clone()));
        let sessions = Sessions::new(app, db, bus.clone(), Channels::new(bus.clone()), accounts);
        let is_whole = |body: &Body| {
            let Body::Deltas(deltas) = body else { return false };
            matches!(deltas.delta[0].op, Some(Op::Reset(_)))
        };
        assert!(is_whole(&said(&sessions, &bus, "/", true).await));
        assert!(matches!(said(&sessions, &bus, "/", false).await, Body::RunFinished(_)));
        // The page is loaded anew, and what it asks for fails.
        assert!(matches!(said(&sessions, &bus, "/broken", true).await, Body::Error(_)));
        assert!(is_whole(&said(&sessions, &bus, "/", false).await));
    }

    #[tokio::test]
    async fn page_errors_of_the_database_are_for_the_log() {
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
            assert!(matches!(Failed::of(&error), Failed::Ours(reason) if reason.contains("nowhere")));
        }
        let told: PageError = "the report is not there yet".into();
        assert_eq!(Failed::of(&told), Failed::Told("the report is not there yet".into()));
    }

    #[test]
    fn pages_lead_to_places_inside_the_app_only() {
        let run_with = |place: &'static str, link: &'static str| {
            let app = App::new().page("/", move |ui| {
                ui.link(link, "there");
                ui.navigate(place);
                Ok(())
            });
            let mut core = Core::default();
            core.visit.path = "/".into();
            run(&app, &mut core, &HashSet::new()).map(|(_, effects)| effects.navigate.unwrap())
        };
        assert_eq!(run_with("/console?tab=1", "https://other.example").unwrap(), "/console?tab=1");
        for (place, link) in
            [("/\\evil.example", "/"), ("//evil.example", "/"), ("/", "javascript:alert(1)"), ("/", "/\t/x")]
        {
            assert!(matches!(run_with(place, link), Err(Failed::Told(_))), "{place} {link}");
        }
        let app = App::new().page("/", |_| panic!("column \"secret\""));
        let mut core = Core::default();
        core.visit.path = "/".into();
        assert!(matches!(run(&app, &mut core, &HashSet::new()), Err(Failed::Ours(_))));
    }

    #[tokio::test]
    async fn a_user_keeps_so_many_sessions() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let db = Db::open(None, dir.path()).await.unwrap();
        let accounts = Arc::new(Accounts::new(db.clone()));
        let sessions = Sessions::new(App::new(), db.clone(), bus.clone(), Channels::new(bus), accounts);
        for n in 0..KEPT_PER_USER + 5 {
            sessions
                .session(&format!("{n:032}"), "ann")
                .await
                .map_err(|refusal| refusal.1)
                .unwrap();
        }
        sessions.session(ID, "bob").await.map_err(|refusal| refusal.1).unwrap();
        sessions.put_away().await;
        let count = sqlx::query_as("SELECT COUNT(*) FROM app_sessions").fetch_one(db.read());
        let (count,): (i64,) = count.await.unwrap();
        assert_eq!(count, KEPT_PER_USER + 1);
    }

    #[test]
    fn a_large_tree_goes_in_portions_and_nothing_is_left_out() {
        let leaf = |i: usize| Element::new("text").text("text", format!("{i}").repeat(3000));
        let card = |i: usize| Element {
            children: (0..40).map(leaf).collect(),
            ..Element::new("card").number("n", i as f64)
        };
        let nodes = adopt((0..30).map(card).collect(), &mut Ids::default());
        let parts = parts(whole(&nodes));
        assert!(parts.len() > 10);
        assert!(
            parts
                .iter()
                .all(|part| Deltas { delta: part.clone() }.encoded_len() <= FORWARD_MAX + 1024)
        );
        let count = |part: &Delta| match part.op.as_ref().unwrap() {
            Op::Reset(reset) => reset.children.iter().map(|node| 1 + node.children.len()).sum::<usize>(),
            Op::Insert(insert) => 1 + insert.node.as_ref().unwrap().children.len(),
            _ => 0,
        };
        assert_eq!(parts.iter().flatten().map(count).sum::<usize>(), 30 * 41);
    }
}
