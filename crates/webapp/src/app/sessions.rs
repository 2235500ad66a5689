//! Sessions of pages: receives a page's messages (RPC `app.event`), passes them to its view, publishes the result.
//!
//! A session lives in the memory of one web app, its owner, whose name is in the database. Other web apps forward calls
//! to the owner; if the owner does not answer, they take the session over from its stored state.

use super::App;
use super::state::Snapshot;
use super::stored::Stored;
use super::view::View;
use crate::accounts::Accounts;
use crate::channels::Channels;
use crate::db::Db;
use crate::rpc::{self, Caller, Refusal};
use bus::Bus;
use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message as _;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::app::{Back, Body, Forward, Said};
use wire::realtime::ErrorCode;

/// Maximum sessions in memory; beyond it, the session that is idle for longest is evicted.
const SESSIONS_MAX: usize = 10_000;
/// A session idle for this long is evicted from memory.
const IDLE_MAX: Duration = Duration::from_secs(30 * 60);
/// Maximum queued messages of one session.
const PENDING_MAX: usize = 64;
/// Changed sessions are written this often.
const SAVE_EVERY: Duration = Duration::from_millis(500);
/// Idle and old sessions are evicted once per this many saves, that is, once a minute.
const SAVES_PER_EVICTION: u32 = 120;
/// Sessions with a larger snapshot are not written, so they do not survive a restart.
const SNAPSHOT_MAX: usize = 256 * 1024;
/// If the owner of a session does not answer a forwarded call within this time, it loses the session.
const OWNER_TIMEOUT: Duration = Duration::from_secs(3);
/// The subject on which an owner receives forwarded calls, followed by its name.
const OWNER_PREFIX: &str = "beamline.webapp.v1.session.";
/// The name of the method by which one web app forwards a page's message to another.
pub const FORWARDED: &str = "app.event, forwarded";

pub struct Sessions {
    app: App,
    bus: Bus,
    channels: Channels,
    accounts: Arc<Accounts>,
    stored: Stored,
    live: Mutex<HashMap<String, Arc<Session>>>,
}

enum Place {
    Here(Arc<Session>),
    /// The session is in the memory of the web app with this name.
    At(String),
}

struct Session {
    id: String,
    user: String,
    /// Messages that no run has handled yet.
    pending: Mutex<VecDeque<Said>>,
    /// Locked for a run, including its publications.
    view: tokio::sync::Mutex<View>,
    touched: Mutex<Instant>,
    /// Whether the view changed since it was last written.
    changed: AtomicBool,
}

impl Session {
    fn of(self: Arc<Self>, user: &str) -> Result<Place, Refusal> {
        if self.user == user {
            Ok(Place::Here(self))
        } else {
            Err(foreign())
        }
    }
}

impl Sessions {
    pub fn new(app: App, db: Db, bus: Bus, channels: Channels, accounts: Arc<Accounts>) -> Self {
        Self {
            app,
            bus,
            channels,
            accounts,
            stored: Stored::new(db),
            live: Mutex::default(),
        }
    }

    /// The subject on which this web app receives forwarded calls.
    pub fn subject(&self) -> String {
        owner_subject(&self.stored.name)
    }

    /// Handles one message of a page, and answers once a run has processed it.
    pub async fn handle(&self, caller: &Caller, payload: Bytes, forwarded: bool) -> Result<Bytes, Refusal> {
        let back = read(&payload)?;
        // A newer page may send a kind of message that this version does not know.
        let Some(said) = back.body else { return Ok(Bytes::new()) };

        // A forwarded call is never forwarded again, so two web apps that disagree cannot create a loop.
        let session = match self.locate(&back.session, &caller.user).await? {
            Place::Here(session) => session,
            Place::At(_) if forwarded => return Err(moved()),
            Place::At(owner) => {
                match rpc::forward(&self.bus, &owner_subject(&owner), caller, payload, OWNER_TIMEOUT).await {
                    Ok(answer) => return answer,
                    Err(error) => {
                        tracing::info!(session = back.session, owner, %error, "taking over a page session");
                        self.take_over(&back.session, &caller.user, &owner).await?
                    }
                }
            }
        };
        self.run(&session, said).await
    }

    /// Queues a message, then runs the page function for all that are queued.
    async fn run(&self, session: &Session, said: Said) -> Result<Bytes, Refusal> {
        {
            let mut pending = session.pending.lock();
            if pending.len() >= PENDING_MAX {
                let text = "too many interactions of this page are queued; try again";
                return Err(Refusal(ErrorCode::TooManyRequests, text.into()));
            }
            pending.push_back(said);
        }

        // Messages that arrive during a run share the next one.
        let mut view = session.view.lock().await;
        let batch: Vec<Said> = session.pending.lock().drain(..).collect();
        if batch.is_empty() {
            // The previous run has processed this message.
            return Ok(Bytes::new());
        }
        let handled = view.handle(&self.app, &session.id, batch);
        if !self.publish(session, handled.run, handled.bodies).await {
            view.lost();
        }

        session.changed.store(true, Relaxed);
        match handled.refused {
            Some(text) => Err(Refusal::bad(text)),
            None => Ok(Bytes::new()),
        }
    }

    /// Publishes to the session's channel, in order. Returns false if a publication failed, so that the page misses it.
    async fn publish(&self, session: &Session, run: u64, bodies: Vec<Body>) -> bool {
        let channel = format!("app:{}#{}", session.id, session.user);
        for body in bodies {
            let data = Forward::new(run, body).encode_to_vec();
            if let Err(error) = self.channels.publish_bytes(&channel, &data).await {
                tracing::warn!(
                    session = session.id,
                    "cannot publish to a page; its next run sends the whole tree: {error}"
                );
                return false;
            }
        }
        true
    }

    /// Finds the owner of a session, which is this web app if the session is new or had no owner.
    async fn locate(&self, id: &str, user: &str) -> Result<Place, Refusal> {
        if let Some(session) = self.live.lock().get(id) {
            // Under the lock, so that the session cannot be evicted in between.
            *session.touched.lock() = Instant::now();
            return session.clone().of(user);
        }

        let internal = |error: crate::db::Error| Refusal::internal("cannot read a page session", error);
        let row = self.stored.find_or_create(id, user).await.map_err(internal)?;
        if row.user != user {
            return Err(foreign());
        }
        let ours = self.stored.claim(id, &row.owner).await.map_err(internal)?;
        if !ours {
            return Ok(Place::At(row.owner));
        }

        // A snapshot of another version may be unreadable. The session then starts over.
        let snapshot: Snapshot = serde_json::from_str(&row.snapshot).unwrap_or_default();
        let view = View::restore(snapshot, user, self.accounts.name(user).await);
        self.keep_live(id, user, view)
    }

    /// Takes a session over from an owner that did not answer.
    async fn take_over(&self, id: &str, user: &str, owner: &str) -> Result<Arc<Session>, Refusal> {
        let taken = self.stored.take_from(id, owner).await;
        taken.map_err(|error| Refusal::internal("cannot take over a page session", error))?;
        match self.locate(id, user).await? {
            Place::Here(session) => Ok(session),
            // Another web app was faster.
            Place::At(_) => Err(moved()),
        }
    }

    fn keep_live(&self, id: &str, user: &str, view: View) -> Result<Place, Refusal> {
        let fresh = Arc::new(Session {
            id: id.into(),
            user: user.into(),
            pending: Mutex::default(),
            view: view.into(),
            touched: Mutex::new(Instant::now()),
            changed: AtomicBool::new(false),
        });

        let mut live = self.live.lock();
        if live.len() >= SESSIONS_MAX {
            // Evicting a changed session would lose its unsaved changes.
            let oldest = live
                .values()
                .filter(|session| !session.changed.load(Relaxed))
                .min_by_key(|session| *session.touched.lock());
            if let Some(oldest) = oldest.map(|session| session.id.clone()) {
                live.remove(&oldest);
            }
        }

        // Another call of the same page may have restored the session meanwhile.
        let session = live.entry(id.into()).or_insert(fresh).clone();
        metrics::gauge!("beamline_webapp_sessions").set(live.len() as f64);
        session.of(user)
    }

    /// Saves changed sessions and evicts idle ones, until cancelled; then releases all sessions.
    pub async fn keep(&self, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(SAVE_EVERY);
        let mut saves = 0u32;
        loop {
            let last = tokio::select! {
                () = cancel.cancelled() => true,
                _ = ticks.tick() => false,
            };
            if let Err(error) = self.save().await {
                tracing::warn!("cannot save page sessions; retrying: {error}");
            }
            if last {
                break;
            }
            saves = saves.wrapping_add(1);
            if saves % SAVES_PER_EVICTION == 1 {
                self.evict().await;
            }
        }

        if let Err(error) = self.stored.release().await {
            tracing::warn!("cannot release page sessions; other web apps take them over when a page calls: {error}");
        }
    }

    async fn save(&self) -> crate::db::Result<()> {
        let changed: Vec<Arc<Session>> = {
            let live = self.live.lock();
            // Cleared before the snapshot is taken, so that a concurrent change marks the session again.
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
            // A run may take long, so a busy session is saved the next time.
            let Ok(view) = session.view.try_lock() else {
                session.changed.store(true, Relaxed);
                continue;
            };
            let snapshot = serde_json::to_string(&view.snapshot()).unwrap_or_default();
            if snapshot.len() > SNAPSHOT_MAX {
                let bytes = snapshot.len();
                tracing::warn!(session = session.id, bytes, "a page session is too large to be saved");
                continue;
            }
            snapshots.push((&*session.id, snapshot));
        }

        let lost = self.stored.save(&snapshots).await?;
        let mut live = self.live.lock();
        for id in lost {
            live.remove(&id);
        }
        Ok(())
    }

    /// Removes idle sessions from memory, and old ones from the database.
    async fn evict(&self) {
        self.live
            .lock()
            .retain(|_, session| session.changed.load(Relaxed) || session.touched.lock().elapsed() < IDLE_MAX);
        if let Err(error) = self.stored.delete_old().await {
            tracing::warn!("cannot delete old page sessions: {error}");
        }
    }
}

fn read(payload: &Bytes) -> Result<Back, Refusal> {
    let back = Back::decode(payload.clone()).map_err(|e| Refusal::bad(format!("not a message of a page: {e}")))?;
    if back.version == 0 {
        return Err(Refusal::bad("a message of a page has a version of 1 or more"));
    }
    if !(16..=64).contains(&back.session.len()) || !back.session.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Refusal::bad("a session id has 16 to 64 hexadecimal digits"));
    }
    Ok(back)
}

fn owner_subject(name: &str) -> String {
    format!("{OWNER_PREFIX}{name}")
}

fn foreign() -> Refusal {
    Refusal(ErrorCode::PermissionDenied, "this session belongs to another user".into())
}

fn moved() -> Refusal {
    Refusal::again("the session has moved to another web app; try again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::stored::KEPT_PER_USER;
    use base64::Engine as _;
    use wire::app::{Op, Rerun};
    use wire::channels::{Answer, Position, Publish};

    const ID: &str = "00112233445566778899aabbccddeeff";

    /// Lets the page visit `path`. Returns the first publication; the test acts as the node that receives it.
    async fn visit(sessions: &Sessions, bus: &Bus, path: &str, reset: bool) -> Body {
        let rerun = Said::Rerun(Rerun { path: path.into(), query: String::new(), reset });
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
    async fn page_without_a_tree_receives_the_whole_one_even_after_a_failed_run() {
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

        assert!(is_whole(&visit(&sessions, &bus, "/", true).await));
        assert!(matches!(visit(&sessions, &bus, "/", false).await, Body::RunFinished(_)));
        // The page is reloaded, so it has no tree, and its first run fails.
        assert!(matches!(visit(&sessions, &bus, "/broken", true).await, Body::Error(_)));
        assert!(is_whole(&visit(&sessions, &bus, "/", false).await));
    }

    #[tokio::test]
    async fn oldest_sessions_of_a_user_are_deleted_beyond_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let db = Db::open(None, dir.path()).await.unwrap();
        let accounts = Arc::new(Accounts::new(db.clone()));
        let sessions = Sessions::new(App::new(), db.clone(), bus.clone(), Channels::new(bus), accounts);

        for n in 0..KEPT_PER_USER + 5 {
            let located = sessions.locate(&format!("{n:032}"), "ann").await;
            located.map_err(|refusal| refusal.1).unwrap();
        }
        sessions.locate(ID, "bob").await.map_err(|refusal| refusal.1).unwrap();
        sessions.evict().await;

        let count = sqlx::query_as("SELECT COUNT(*) FROM app_sessions").fetch_one(db.read());
        let (count,): (i64,) = count.await.unwrap();
        assert_eq!(count, KEPT_PER_USER + 1);
    }
}
