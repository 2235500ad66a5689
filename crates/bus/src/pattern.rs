//! Subject patterns of streams: which of two covers the other, whether they overlap, and their union.

/// Whether `pattern` matches every subject that `other` matches.
pub fn covers(pattern: &str, other: &str) -> bool {
    let mut others = other.split('.');
    for token in pattern.split('.') {
        match (token, others.next()) {
            (">", Some(_)) => return true,
            ("*", Some(">")) | (_, None) => return false,
            ("*", Some(_)) => {}
            (token, Some(other)) if token == other => {}
            _ => return false,
        }
    }
    others.next().is_none()
}

/// Whether a subject exists that both patterns match. No two streams may take the same subject.
pub fn overlap(one: &str, other: &str) -> bool {
    let (mut ones, mut others) = (one.split('.'), other.split('.'));
    loop {
        match (ones.next(), others.next()) {
            (None, None) | (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some("*"), Some(_)) | (Some(_), Some("*")) => {}
            (Some(one), Some(other)) if one == other => {}
            _ => return false,
        }
    }
}

/// The patterns of both lists, without those that another pattern covers: a stream's patterns must not overlap.
pub fn union(known: &[String], added: &[String]) -> Vec<String> {
    let mut union: Vec<String> = Vec::new();
    for pattern in known.iter().chain(added) {
        if !union.iter().any(|kept| covers(kept, pattern)) {
            union.retain(|kept| !covers(pattern, kept));
            union.push(pattern.clone());
        }
    }
    union
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_cover_and_overlap_by_token() {
        for (one, other, covered, overlapping) in [
            ("a.b", "a.b", true, true),
            ("a.*", "a.b", true, true),
            ("a.*", "a.*", true, true),
            ("a.*", "a.>", false, true),
            ("a.>", "a.*", true, true),
            ("a.>", "a", false, false),
            ("a.b", "a.*", false, true),
            ("a.*.c", "a.b.*", false, true),
            ("a.*.c", "a.b.d", false, false),
            ("a.b", "a.b.c", false, false),
            (">", "a.b.>", true, true),
        ] {
            assert_eq!(covers(one, other), covered, "{one} covers {other}");
            assert_eq!(overlap(one, other), overlapping, "{one} overlaps {other}");
            assert_eq!(overlap(other, one), overlapping, "{other} overlaps {one}");
        }
    }

    #[test]
    fn union_keeps_the_wider_pattern() {
        let list = |patterns: &[&str]| patterns.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(union(&list(&["a.b", "c"]), &list(&["d", "a.*", "c"])), list(&["c", "d", "a.*"]));
        assert_eq!(union(&list(&["a.>"]), &list(&["a.b"])), list(&["a.>"]));
    }
}
