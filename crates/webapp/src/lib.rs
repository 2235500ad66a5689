//! Live web apps: accounts, pages that are functions in Rust, and the product's two apps, the chat and the console.
//!
//! A page sends RPCs over its WebSocket, and a node forwards them on the bus. What the page must show goes back as
//! publications on the session's own channel.

mod accounts;
mod app;
mod auth;
mod channels;
mod chat;
mod db;
mod diff;
mod files;
mod live;
mod pages;
mod rate_limits;
mod rpc;
mod sign_in_limits;
mod tree;

pub use accounts::{User, generate_password};
pub use app::{App, Column, PageError, Series, State, Tone, Ui};
pub use chat::Quotas;

use accounts::Accounts;
use app::sessions::Sessions;
use bus::Bus;
use bytes::Bytes;
use channels::Channels;
use chat::Chat;
use db::Db;
use rpc::{Caller, Handler, Methods, Refusal};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

#[derive(Debug, Clone)]
pub struct Config {
    /// Holds `webapp.db`, unless `database_url` names another database.
    pub data_dir: PathBuf,
    /// `sqlite://…` or `postgres://…`.
    pub database_url: Option<String>,
    /// The key that signs connection tokens, which are JWTs (HS256).
    pub token_secret: Vec<u8>,
    pub token_ttl: Duration,
    /// Whether people may create accounts themselves.
    pub signup: bool,
    /// Origins, as `https://…`, whose pages may sign in; our own always may.
    pub origins: Vec<String>,
    /// Accounts that may stop anybody's answers and delete anybody's rooms, in lower case.
    pub operators: Vec<String>,
    /// The limits of each user.
    pub quotas: Quotas,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "data".into(),
            database_url: None,
            token_secret: Vec::new(),
            token_ttl: Duration::from_secs(15 * 60),
            signup: true,
            origins: Vec::new(),
            operators: vec!["admin".into()],
            quotas: Quotas::default(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the bus refused: {0}")]
    Bus(#[from] bus::Error),
    #[error(transparent)]
    Database(#[from] db::Error),
    #[error(transparent)]
    Account(#[from] accounts::Error),
    #[error("a loop of the web app panicked: {0}")]
    Panic(#[from] tokio::task::JoinError),
    #[error("a loop of the web app ended unexpectedly; the web app cannot work without it, so it stops")]
    LoopEnded,
}

/// A web app whose database is open and whose subscriptions are made. It answers no calls until [`Bound::run`].
pub struct Bound {
    db: Db,
    accounts: Arc<Accounts>,
    auth: Arc<auth::Auth>,
    sessions: Arc<Sessions>,
    chat: Arc<Chat>,
    chat_loops: chat::Loops,
    calls: Methods,
    events: Methods,
    forwarded: Methods,
    live: live::Live,
}

pub async fn bind(config: Config, bus: Bus) -> Result<Bound, Error> {
    let db = Db::open(config.database_url.as_deref(), &config.data_dir).await?;
    let accounts = Arc::new(Accounts::new(db.clone()));
    let channels = Channels::new(bus.clone());

    // Enough of the hash to compare secrets, not enough to guess one.
    let secret = accounts::hash(&config.token_secret)[..8].to_string();
    let same = live::Same { database: db.id().await?, secret };

    let (chat, chat_loops) =
        Chat::bind(&bus, db.clone(), channels.clone(), accounts.clone(), config.quotas, config.operators.clone())
            .await?;
    let sessions = Sessions::new(pages::app(chat.rooms()), db.clone(), bus.clone(), channels.clone(), accounts.clone());
    let auth = auth::Auth {
        accounts: accounts.clone(),
        token_secret: config.token_secret,
        token_ttl: config.token_ttl,
        signup: config.signup,
        origins: config.origins,
        operators: config.operators,
        channels: channels.clone(),
        guesses: sign_in_limits::Guesses::default(),
    };

    Ok(Bound {
        db,
        accounts,
        auth: Arc::new(auth),
        chat,
        chat_loops,
        calls: Methods::subscribe(&bus, chat::METHODS).await?,
        events: Methods::subscribe(&bus, &[wire::app::EVENT_METHOD]).await?,
        forwarded: Methods::subscribe_alone(&bus, app::sessions::FORWARDED, &sessions.subject()).await?,
        live: live::Live::subscribe(&bus, channels, same).await?,
        sessions: Arc::new(sessions),
    })
}

/// Creates an account in a database that a web app uses or will use.
pub async fn add_user(config: &Config, name: &str, password: &str) -> Result<User, Error> {
    let db = Db::open(config.database_url.as_deref(), &config.data_dir).await?;
    let user = Accounts::new(db.clone()).create(name, password).await?;
    db.close().await;
    Ok(user)
}

impl Bound {
    /// Whether there are no accounts yet. If so, the caller creates one with [`Self::create_admin`] after it has stored
    /// the password.
    pub async fn is_new(&self) -> Result<bool, Error> {
        Ok(self.accounts.is_empty().await?)
    }

    /// Creates the account `admin`. Returns false if another web app on the same database has already created it.
    pub async fn create_admin(&self, password: &str) -> Result<bool, Error> {
        match self.accounts.create("admin", password).await {
            Ok(_) => Ok(true),
            Err(accounts::Error::Taken(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    pub fn ready(&self) -> Ready {
        Ready(self.db.clone())
    }

    /// The routes for signing in, and the pages as the fallback.
    pub fn routes(&self) -> axum::Router {
        auth::routes(self.auth.clone()).merge(files::routes())
    }

    /// Answers until cancelled, then finishes the calls in flight.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), Error> {
        let Self { db, sessions, chat, chat_loops, calls, events, forwarded, live, .. } = self;
        let cancel = cancel.child_token();
        let mut loops: JoinSet<Result<(), Error>> = JoinSet::new();

        let (answers, stop) = (chat.clone(), cancel.clone());
        loops.spawn(async move { answers.run(chat_loops, stop).await });
        loops.spawn(infallible(calls.serve(chat, cancel.clone())));
        // Forwarded events have their own concurrency limit: if two web apps forward to each other, neither waits for
        // a permit that the other holds.
        for methods in [events, forwarded] {
            let handler = Arc::new(Events(sessions.clone()));
            loops.spawn(infallible(methods.serve(handler, cancel.clone())));
        }
        loops.spawn(infallible(live.run(cancel.clone())));

        let stop_keeping = CancellationToken::new();
        let (keeping, stop) = (sessions.clone(), stop_keeping.clone());
        let keeper = JoinSet::from_iter([async move { keeping.keep(stop).await }]);

        let mut ended = Ok(());
        while let Some(joined) = loops.join_next().await {
            // If one loop ends by itself, all end: a web app with only some of its loops would appear to work.
            let expected = if cancel.is_cancelled() {
                Ok(())
            } else {
                Err(Error::LoopEnded)
            };
            cancel.cancel();
            ended = ended
                .and(joined.map_err(Error::from).and_then(|inner| inner))
                .and(expected);
        }

        // No session changes any more, so the last save is complete.
        stop_keeping.cancel();
        keeper.join_all().await;
        db.close().await;
        ended
    }
}

async fn infallible(work: impl Future<Output = ()>) -> Result<(), Error> {
    work.await;
    Ok(())
}

/// Checks whether the database answers.
#[derive(Clone)]
pub struct Ready(Db);

impl Ready {
    pub async fn check(&self) -> Result<(), String> {
        sqlx::query("SELECT 1")
            .execute(self.0.read())
            .await
            .map(|_| ())
            .map_err(|e| e.to_string())
    }
}

struct Events(Arc<Sessions>);

impl Handler for Events {
    async fn call(&self, method: &'static str, caller: Caller, payload: Bytes) -> Result<Bytes, Refusal> {
        let forwarded = method == app::sessions::FORWARDED;
        self.0.handle(&caller, payload, forwarded).await
    }
}
