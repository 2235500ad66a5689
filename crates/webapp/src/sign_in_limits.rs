//! Delays attempts to guess passwords, without locking out the owner of the account.
//!
//! A few wrong passwords delay further attempts from that address; many, from any addresses, delay all browsers in
//! which the account has never signed in. A browser in which it has signed in is counted separately, so strangers
//! cannot lock the owner out.

use crate::rate_limits::{Backoff, Rate, Wait};
use parking_lot::Mutex;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Attempts per minute from one address, over all names.
const PER_ADDRESS: u32 = 60;
/// Attempts per minute from one known browser.
const PER_DEVICE: u32 = 20;
/// New accounts from one address: a burst of this many, then one per pause.
const SIGNUPS: u32 = 50;
const SIGNUP_PAUSE: Duration = Duration::from_secs(60);
/// Wrong passwords for one name without a delay: from one address or known browser, and from all strangers together.
const FREE_HERE: u32 = 5;
const FREE_ANYWHERE: u32 = 20;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const PAUSE_HERE_MAX: Duration = Duration::from_secs(60);
const PAUSE_ANYWHERE_MAX: Duration = Duration::from_secs(30);
/// Wrong passwords are forgotten after this long without another one.
const FORGET: Duration = Duration::from_secs(15 * 60);
const NAME_MAX: usize = 64;

/// One attempt to sign in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Try {
    pub address: IpAddr,
    /// The name as typed.
    pub name: String,
    /// The browser, if this account has signed in there before.
    pub device: Option<String>,
}

/// The outcome of an allowed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Right,
    Wrong,
    /// The password was not checked.
    NotTried,
}

/// An allowed attempt. Dropping it records the outcome: [`Ended::NotTried`] if the client disconnects before there is
/// one.
pub struct Trying<'a> {
    guesses: &'a Guesses,
    by: &'a Try,
    how: Ended,
}

impl Trying<'_> {
    pub fn ended(mut self, how: Ended) {
        self.how = how;
    }
}

impl Drop for Trying<'_> {
    fn drop(&mut self) {
        self.guesses.ended(self.by, self.how);
    }
}

pub struct Guesses(Mutex<Counts>);

struct Counts {
    addresses: Rate<IpAddr>,
    devices: Rate<String>,
    signups: Rate<IpAddr>,
    /// By address and name.
    here: Backoff<(IpAddr, String)>,
    /// By known browser.
    known: Backoff<String>,
    /// By name, over all strangers.
    anywhere: Backoff<String>,
}

impl Default for Guesses {
    fn default() -> Self {
        Self(Mutex::new(Counts {
            addresses: Rate::per_minute(PER_ADDRESS),
            devices: Rate::per_minute(PER_DEVICE),
            signups: Rate::new(SIGNUPS, SIGNUP_PAUSE),
            here: Backoff::new(FREE_HERE, FIRST_PAUSE, PAUSE_HERE_MAX, FORGET),
            known: Backoff::new(FREE_HERE, FIRST_PAUSE, PAUSE_HERE_MAX, FORGET),
            anywhere: Backoff::new(FREE_ANYWHERE, FIRST_PAUSE, PAUSE_ANYWHERE_MAX, FORGET),
        }))
    }
}

impl Guesses {
    /// Like [`Self::begin`], for a caller that may be dropped while it checks the password.
    pub fn trying<'a>(&'a self, by: &'a Try, now: Instant) -> Result<Trying<'a>, Wait> {
        self.begin(by, now)?;
        Ok(Trying { guesses: self, by, how: Ended::NotTried })
    }

    /// Allows the password to be checked, or returns how long to wait. The attempt counts as wrong until
    /// [`Self::ended`], so that concurrent attempts do not get around the limit.
    fn begin(&self, by: &Try, now: Instant) -> Result<(), Wait> {
        let counts = &mut *self.0.lock();
        // A known browser is not counted by its address or name, so strangers cannot delay it.
        if let Some(device) = &by.device {
            counts.known.check(device, now)?;
            counts.devices.take(device, now)?;
            counts.known.failed(device, now);
            return Ok(());
        }

        let name = account(&by.name);
        let here = (by.address, name);
        counts.here.check(&here, now)?;
        counts.anywhere.check(&here.1, now)?;
        // Checked last, so that an attempt that was refused for its name does not count against others at this address.
        counts.addresses.take(&by.address, now)?;
        counts.here.failed(&here, now);
        counts.anywhere.failed(&here.1, now);
        Ok(())
    }

    fn ended(&self, by: &Try, how: Ended) {
        let counts = &mut *self.0.lock();
        let here = (by.address, account(&by.name));
        match (how, &by.device) {
            // Already counted by `begin`.
            (Ended::Wrong, _) => {}
            (Ended::Right, Some(device)) => counts.known.forget(device),
            (Ended::NotTried, Some(device)) => counts.known.give_back(device),
            // A correct password from this address says nothing about other addresses, so their failures stay.
            (Ended::Right, None) => {
                counts.here.forget(&here);
                counts.anywhere.give_back(&here.1);
            }
            (Ended::NotTried, None) => {
                counts.here.give_back(&here);
                counts.anywhere.give_back(&here.1);
            }
        }
    }

    /// Counts a new account.
    pub fn signup(&self, address: IpAddr, now: Instant) -> Result<(), Wait> {
        self.0.lock().signups.take(&address, now)
    }
}

/// Returns the account id of a typed name, truncated to a bounded length.
pub fn account(name: &str) -> String {
    name.trim().chars().take(NAME_MAX).collect::<String>().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn stranger(address: u32, name: &str) -> Try {
        Try {
            address: IpAddr::from(address.to_be_bytes()),
            name: name.into(),
            device: None,
        }
    }

    /// Makes `tries` attempts at the same moment, all with a wrong password. Returns how many were allowed.
    fn wrong(guesses: &Guesses, by: &Try, tries: u32, now: Instant) -> usize {
        (0..tries).filter(|_| guesses.begin(by, now).is_ok()).count()
    }

    #[test]
    fn wrong_passwords_for_one_name_do_not_lock_out_others() {
        let (guesses, now) = (Guesses::default(), Instant::now());
        assert_eq!(wrong(&guesses, &stranger(1, "ann"), 70, now), FREE_HERE as usize + 1);
        assert!(guesses.begin(&stranger(1, " Ann "), now).is_err(), "the same account");
        for name in ["bob", "carol", "dave"] {
            assert_eq!(guesses.begin(&stranger(1, name), now), Ok(()), "{name}, behind the same address");
        }
        assert_eq!(guesses.begin(&stranger(2, "ann"), now), Ok(()), "the owner, elsewhere");
    }

    #[test]
    fn owner_signs_in_from_a_known_browser_while_strangers_guess() {
        let guesses = Guesses::default();
        let mut now = Instant::now();
        let owner = Try { device: Some("laptop".into()), ..stranger(7, "ann") };
        let mut allowed = 0;
        for minute in 0..60 {
            for address in 0..100 {
                allowed += wrong(&guesses, &stranger(1000 + address, "ann"), 10, now);
            }
            assert!(guesses.begin(&stranger(7, "ann"), now).is_err(), "minute {minute}: a new browser waits");
            assert_eq!(guesses.begin(&owner, now), Ok(()), "minute {minute}");
            guesses.ended(&owner, Ended::Right);
            now += 60 * SECOND;
        }
        assert!(allowed < 100, "{allowed} attempts were allowed in an hour, of a thousand per minute");
        now += FORGET;
        assert_eq!(guesses.begin(&stranger(7, "ann"), now), Ok(()), "the lockout is temporary");
    }

    #[test]
    fn known_browser_is_delayed_too() {
        let (guesses, now) = (Guesses::default(), Instant::now());
        let thief = Try { device: Some("stolen".into()), ..stranger(1, "ann") };
        assert_eq!(wrong(&guesses, &thief, 70, now), FREE_HERE as usize + 1);
        assert!(guesses.begin(&thief, now + SECOND / 2).is_err());
        assert_eq!(guesses.begin(&thief, now + SECOND), Ok(()));
        assert!(guesses.begin(&thief, now + 2 * SECOND).is_err(), "twice as long as before");
    }

    #[test]
    fn correct_password_resets_the_address_and_an_unchecked_one_does_not_count() {
        let (guesses, now) = (Guesses::default(), Instant::now());
        let ann = stranger(1, "ann");
        for _ in 0..FREE_ANYWHERE / FREE_HERE {
            assert_eq!(wrong(&guesses, &ann, FREE_HERE, now), FREE_HERE as usize);
            for how in [Ended::NotTried, Ended::Right] {
                guesses.begin(&ann, now).unwrap();
                guesses.ended(&ann, how);
            }
        }
        assert_eq!(wrong(&guesses, &ann, FREE_HERE, now), 1, "over all addresses, wrong ones between right ones count");
    }

    #[test]
    fn address_is_counted_over_all_names() {
        let (guesses, now) = (Guesses::default(), Instant::now());
        let names = (0..200)
            .filter(|n| guesses.begin(&stranger(1, &format!("n{n}")), now).is_ok())
            .count();
        assert_eq!(names, PER_ADDRESS as usize);
        assert_eq!(guesses.begin(&stranger(2, "n1"), now), Ok(()));

        // The limit is continuous: there is no moment at which a new burst is allowed.
        for second in 1..120 {
            let later = now + second * SECOND;
            let names = (0..10)
                .filter(|n| guesses.begin(&stranger(1, &format!("{second}.{n}")), later).is_ok())
                .count();
            assert!(names <= 2, "second {second}: {names}");
        }

        let signups = (0..200)
            .filter(|_| guesses.signup(IpAddr::from([1; 4]), now).is_ok())
            .count();
        assert_eq!(signups, SIGNUPS as usize);
    }
}
