//! Accounts: names, passwords, and the browsers in which they are signed in.

use crate::db::{self, Db, now_ms};
use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

pub const PASSWORD_MIN: usize = 8;
pub const PASSWORD_MAX: usize = 256;
const NAME_MAX: usize = 32;
/// How long a browser stays signed in.
pub const LOGIN_TTL: Duration = Duration::from_secs(30 * 86_400);
/// Maximum wait for a permit to hash; after it, the caller gets [`Error::Busy`].
const HASHING_WAIT_MAX: Duration = Duration::from_secs(5);
/// The user that answers in the chat. It has no account.
pub const ASSISTANT: &str = "assistant";
/// Names that no account may have.
const RESERVED: &[&str] = &[ASSISTANT, "everyone", "all", "here", "system"];

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Invalid(String),
    #[error("the name {0} is taken; choose another")]
    Taken(String),
    #[error("name or password is wrong")]
    Wrong,
    #[error(transparent)]
    Database(#[from] db::Error),
    #[error("cannot hash the password: {0}")]
    Hash(String),
    #[error("too many people are signing in; try again in a moment")]
    Busy,
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error.into())
    }
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The name in lower case. Channels and tokens carry it.
    pub id: String,
    pub name: String,
}

pub struct Accounts {
    db: Db,
    /// Limits concurrent hashing: each hash takes 19 MiB and a core.
    hashing: Arc<Semaphore>,
}

impl Accounts {
    pub fn new(db: Db) -> Self {
        Self { db, hashing: Arc::new(Semaphore::new(2)) }
    }

    pub async fn create(&self, name: &str, password: &str) -> Result<User> {
        let user = User { id: user_id(name)?, name: name.trim().to_string() };
        if !(PASSWORD_MIN..=PASSWORD_MAX).contains(&password.len()) {
            return Err(Error::Invalid(format!("a password has {PASSWORD_MIN} to {PASSWORD_MAX} bytes")));
        }
        if self.find(&user.id).await?.is_some() {
            return Err(Error::Taken(user.name));
        }

        let hash = self.hash(password.to_string()).await?;
        let insert =
            "INSERT INTO users (id, name, password, created_at) VALUES ($1, $2, $3, $4) ON CONFLICT (id) DO NOTHING";
        let insert = sqlx::query(insert)
            .bind(&user.id)
            .bind(&user.name)
            .bind(hash)
            .bind(now_ms());
        if insert.execute(self.db.write()).await?.rows_affected() == 0 {
            // Another web app has created it since the check.
            return Err(Error::Taken(user.name));
        }
        Ok(user)
    }

    /// Returns the user with this name and password. An unknown name takes as long as a wrong password, so that timing
    /// does not reveal which names exist.
    pub async fn verify(&self, name: &str, password: &str) -> Result<User> {
        // No account has such a password, so do not hash it.
        if password.len() > PASSWORD_MAX {
            return Err(Error::Wrong);
        }
        let known = match user_id(name) {
            Ok(id) => self.find(&id).await?,
            Err(_) => None,
        };

        let password = password.to_string();
        let Some((user, hash)) = known else {
            // Takes the time that a known name would take.
            self.hash(password).await?;
            return Err(Error::Wrong);
        };
        if self.matches(password, hash).await? {
            Ok(user)
        } else {
            Err(Error::Wrong)
        }
    }

    /// Signs a user in. Returns the secret for the browser's cookie.
    pub async fn sign_in(&self, user: &User) -> Result<String> {
        let token: [u8; 32] = rand::random();
        let token = hex(&token);
        let now = now_ms();
        let expires_at = now + i64::try_from(LOGIN_TTL.as_millis()).unwrap_or(i64::MAX);

        // Deleting expired sign-ins here needs no background task.
        sqlx::query("DELETE FROM logins WHERE expires_at < $1")
            .bind(now)
            .execute(self.db.write())
            .await?;

        let insert = "INSERT INTO logins (token_hash, user_id, expires_at) VALUES ($1, $2, $3)";
        let insert = sqlx::query(insert)
            .bind(token_hash(&token))
            .bind(&user.id)
            .bind(expires_at);
        insert.execute(self.db.write()).await?;
        Ok(token)
    }

    /// Returns the user of a sign-in, unless it has ended.
    pub async fn signed_in(&self, token: &str) -> Result<Option<User>> {
        let select = "SELECT users.id, users.name FROM logins JOIN users ON users.id = logins.user_id
            WHERE token_hash = $1 AND expires_at > $2";
        let select = sqlx::query_as(select).bind(token_hash(token)).bind(now_ms());
        let found: Option<(String, String)> = select.fetch_optional(self.db.read()).await?;
        Ok(found.map(|(id, name)| User { id, name }))
    }

    /// Ends a sign-in. Returns the id of its user, or `None` if there was no such sign-in.
    pub async fn sign_out(&self, token: &str) -> Result<Option<String>> {
        let delete = "DELETE FROM logins WHERE token_hash = $1 RETURNING user_id";
        let delete = sqlx::query_as(delete).bind(token_hash(token));
        let ended: Option<(String,)> = delete.fetch_optional(self.db.write()).await?;
        Ok(ended.map(|(user,)| user))
    }

    /// Returns the display name of a user. A user with a token but no account is shown by id.
    pub async fn name(&self, id: &str) -> String {
        match self.find(id).await {
            Ok(Some((user, _))) => user.name,
            _ => id.to_string(),
        }
    }

    /// Whether there are no accounts yet.
    pub async fn is_empty(&self) -> Result<bool> {
        let (count,): (i64,) = sqlx::query_as("SELECT COUNT(*) FROM users")
            .fetch_one(self.db.read())
            .await?;
        Ok(count == 0)
    }

    async fn find(&self, id: &str) -> Result<Option<(User, String)>> {
        let select = sqlx::query_as("SELECT id, name, password FROM users WHERE id = $1").bind(id);
        let found: Option<(String, String, String)> = select.fetch_optional(self.db.read()).await?;
        Ok(found.map(|(id, name, hash)| (User { id, name }, hash)))
    }

    async fn hash(&self, password: String) -> Result<String> {
        self.limited(move || {
            let hash: Result<PasswordHash, _> = Argon2::default().hash_password(password.as_bytes());
            hash.map(|hash| hash.to_string())
                .map_err(|e| Error::Hash(e.to_string()))
        })
        .await
    }

    async fn matches(&self, password: String, hash: String) -> Result<bool> {
        self.limited(move || {
            let hash = PasswordHash::new(&hash).map_err(|e| Error::Hash(e.to_string()))?;
            Ok(Argon2::default().verify_password(password.as_bytes(), &hash).is_ok())
        })
        .await
    }

    /// Runs hashing work on a blocking thread, within the limit on concurrent work.
    async fn limited<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T> + Send + 'static,
    {
        let place = tokio::time::timeout(HASHING_WAIT_MAX, self.hashing.clone().acquire_owned()).await;
        let place = place.map_err(|_| Error::Busy)?.expect("the semaphore is never closed");

        let worked = tokio::task::spawn_blocking(move || {
            // If the caller is dropped, the work still completes, and holds its permit until then.
            let _place = place;
            work()
        });
        worked.await.map_err(|e| Error::Hash(e.to_string()))?
    }
}

/// Returns the id of a name. Its characters are those that channel names and mentions can carry.
fn user_id(name: &str) -> Result<String> {
    let name = name.trim();
    let fits = (2..=NAME_MAX).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !fits {
        let text = format!(
            "a name has 2 to {NAME_MAX} letters, digits, dots, dashes or underscores, and begins with a letter or digit"
        );
        return Err(Error::Invalid(text));
    }
    let id = name.to_ascii_lowercase();
    if RESERVED.contains(&&*id) {
        return Err(Error::Invalid(format!("the name {name} is reserved; choose another")));
    }
    Ok(id)
}

/// A cookie has 256 random bits, so a fast hash is as safe as a slow one.
fn token_hash(token: &str) -> String {
    hash(token.as_bytes())
}

/// The name of a sign-in in connection tokens. Neither the cookie nor its hash in the database can be derived from it.
pub fn session(token: &str) -> String {
    hash(token_hash(token).as_bytes())[..32].to_string()
}

pub fn hash(bytes: &[u8]) -> String {
    use sha2::Digest;
    hex(&sha2::Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Generates a password that a person can type: 5 groups of 4 letters and digits, about 100 bits.
pub fn generate_password() -> String {
    use rand::Rng;
    // Without letters and digits that look similar.
    const LETTERS: &[u8] = b"abcdefghjkmnpqrstuvwxyz23456789";
    let mut random = rand::rng();
    let mut group = || -> String {
        (0..4)
            .map(|_| LETTERS[random.random_range(0..LETTERS.len())] as char)
            .collect()
    };
    [group(), group(), group(), group(), group()].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn accounts() -> (tempfile::TempDir, Accounts) {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(None, dir.path()).await.unwrap();
        (dir, Accounts::new(db))
    }

    #[tokio::test]
    async fn new_account_signs_in_and_out() {
        let (_dir, accounts) = accounts().await;
        assert!(accounts.is_empty().await.unwrap());
        let ann = accounts.create("Ann", "correct horse").await.unwrap();
        assert_eq!(ann, User { id: "ann".into(), name: "Ann".into() });
        assert_eq!(accounts.verify("ANN", "correct horse").await.unwrap(), ann);

        let cookie = accounts.sign_in(&ann).await.unwrap();
        assert_eq!(accounts.signed_in(&cookie).await.unwrap(), Some(ann));
        assert_eq!(accounts.sign_out(&cookie).await.unwrap().as_deref(), Some("ann"));
        assert_eq!(accounts.sign_out(&cookie).await.unwrap(), None);
        assert_eq!(accounts.signed_in(&cookie).await.unwrap(), None);
    }

    #[tokio::test]
    async fn dropped_caller_holds_its_permit_until_the_hash_is_done() {
        let (_dir, accounts) = accounts().await;
        accounts.create("ann", "correct horse").await.unwrap();
        // Drops the caller once the work has begun.
        let hung_up = tokio::time::timeout(Duration::ZERO, accounts.hash("x".into())).await;
        assert!(hung_up.is_err());
        assert_eq!(accounts.hashing.available_permits(), 1, "the work is still running");
        accounts.verify("ann", "correct horse").await.unwrap();
    }

    #[tokio::test]
    async fn invalid_names_and_wrong_passwords_are_refused() {
        let (_dir, accounts) = accounts().await;
        accounts.create("ann", "correct horse").await.unwrap();
        assert!(matches!(accounts.create("Ann", "battery staple").await, Err(Error::Taken(_))));

        for name in ["", "a", "a b", "a#b", "-a", "é", "assistant", &"x".repeat(33)] {
            assert!(matches!(accounts.create(name, "correct horse").await, Err(Error::Invalid(_))), "{name}");
        }

        assert!(matches!(accounts.create("bob", "short").await, Err(Error::Invalid(_))));
        for (name, password) in [("ann", "wrong"), ("nobody", "correct horse"), ("", "")] {
            assert!(matches!(accounts.verify(name, password).await, Err(Error::Wrong)), "{name}");
        }
    }
}
