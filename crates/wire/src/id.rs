//! The rules for ids, shared by all parts that accept one: the gateway, the router, workers, web apps.
//!
//! Control characters have a special meaning in program arguments, headers, log lines and terminals, so an id that
//! contains one is refused before any use.

use crate::limits::{ID_MAX, IDEMPOTENCY_KEY_MAX};

/// Why an id is invalid. The text completes a sentence that starts with the field's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    #[error("has {0} bytes; 1 to {ID_MAX} are taken")]
    Length(usize),
    #[error("has a control character; ids have none")]
    Control,
    #[error("has more than {IDEMPOTENCY_KEY_MAX} bytes")]
    Key,
    #[error("must have 1 to {ID_MAX} of the characters A-Z a-z 0-9 _ . -")]
    Tenant,
}

/// Checks the id of a request, trace, assignment, run, policy or task type: 1 to [`ID_MAX`] bytes of UTF-8 without
/// control characters (Unicode category Cc: NUL, line breaks, DEL, C1).
pub fn check(id: &str) -> Result<(), InvalidId> {
    match id.len() {
        1..=ID_MAX if id.contains(char::is_control) => Err(InvalidId::Control),
        1..=ID_MAX => Ok(()),
        bytes => Err(InvalidId::Length(bytes)),
    }
}

/// Checks a tenant's id: 1 to [`ID_MAX`] of the characters `A-Z a-z 0-9 _ . -`.
pub fn check_tenant(id: &str) -> Result<(), InvalidId> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if is_valid(id) && id.bytes().all(plain) {
        Ok(())
    } else {
        Err(InvalidId::Tenant)
    }
}

/// Checks a caller's idempotency key: at most [`IDEMPOTENCY_KEY_MAX`] bytes without control characters.
pub fn check_idempotency_key(key: &str) -> Result<(), InvalidId> {
    match key.len() {
        0..=IDEMPOTENCY_KEY_MAX if key.contains(char::is_control) => Err(InvalidId::Control),
        0..=IDEMPOTENCY_KEY_MAX => Ok(()),
        _ => Err(InvalidId::Key),
    }
}

/// Whether [`check`] accepts the id.
pub fn is_valid(id: &str) -> bool {
    check(id).is_ok()
}

/// Whether [`check_tenant`] accepts the id.
pub fn is_tenant(id: &str) -> bool {
    check_tenant(id).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_must_be_short_and_without_control_characters() {
        for (id, expected) in [
            ("r", Ok(())),
            ("number 7 ü/.*>\u{1F600}", Ok(())),
            (&"x".repeat(128), Ok(())),
            ("", Err(InvalidId::Length(0))),
            (&"x".repeat(129), Err(InvalidId::Length(129))),
            ("a\0b", Err(InvalidId::Control)),
            ("a\nb", Err(InvalidId::Control)),
            ("\u{7f}", Err(InvalidId::Control)),
            ("\u{85}", Err(InvalidId::Control)),
        ] {
            assert_eq!(check(id), expected, "{id:?}");
        }
    }

    #[test]
    fn tenant_id_must_consist_of_plain_characters() {
        assert!(is_tenant("acme-1_x.Y"));
        for bad in ["", "a b", "a*", "ä", "a\0", &"x".repeat(129)] {
            assert_eq!(check_tenant(bad), Err(InvalidId::Tenant), "{bad:?}");
        }
    }
}
