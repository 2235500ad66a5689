//! Decides where a page may send its user.

/// Whether every browser resolves `href` to a path of our own origin. Browsers read a backslash as a slash, and drop
/// control characters and spaces, so a path with any of them is refused.
pub fn is_internal(href: &str) -> bool {
    href.starts_with('/') && !href.starts_with("//") && is_plain(href)
}

/// Whether a link may have this address: one inside the app, or one outside with a scheme that cannot run code.
pub fn is_safe(href: &str) -> bool {
    let outside = ["https://", "http://", "mailto:", "#"];
    let starts = |start: &&str| {
        href.get(..start.len())
            .is_some_and(|head| head.eq_ignore_ascii_case(start))
    };
    is_internal(href) || (is_plain(href) && outside.iter().any(starts))
}

fn is_plain(href: &str) -> bool {
    !href.contains(|c: char| c.is_control() || c == ' ' || c == '\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same table is in the front end's test, `frontend/test/unit/href.test.ts`.
    #[test]
    fn only_paths_of_our_origin_are_internal() {
        for (href, internal, safe) in [
            ("/", true, true),
            ("/rooms/general", true, true),
            ("/rooms/a?b=//c#d", true, true),
            ("/%5Chost", true, true),
            ("/./host", true, true),
            ("/rooms//x", true, true),
            ("/café", true, true),
            ("//host", false, false),
            ("///host", false, false),
            ("/\\host", false, false),
            ("\\\\host", false, false),
            ("\\/host", false, false),
            ("/\t/host", false, false),
            ("/\n/host", false, false),
            ("/\r\\host", false, false),
            ("\t//host", false, false),
            (" /host", false, false),
            ("/ /host", false, false),
            ("/\u{0}/host", false, false),
            ("/\u{7f}/host", false, false),
            ("/\u{85}/host", false, false),
            ("rooms/general", false, false),
            ("", false, false),
            ("?x=1", false, false),
            ("#part", false, true),
            ("https://host/x", false, true),
            ("HTTP://host", false, true),
            ("https:\\\\host", false, false),
            ("https:host", false, false),
            ("mailto:ann@host", false, true),
            ("javascript:alert(1)", false, false),
            ("java\nscript:alert(1)", false, false),
            ("data:text/html,x", false, false),
        ] {
            assert_eq!((is_internal(href), is_safe(href)), (internal, safe), "{href:?}");
        }
    }
}
