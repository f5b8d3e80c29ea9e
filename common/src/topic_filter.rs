//! MQTT topic filters (MQTT 5, 4.7): whether one is valid, what it matches, and whether two meet.

/// Whether `filter` may be subscribed: `+` stands for a whole level, `#` for all that follow and comes last.
/// A shared subscription (`$share/…`) is none: what one of its members gets, the others do not.
pub fn is_valid(filter: &str) -> bool {
    let mut levels = filter.split('/').peekable();
    let mut valid = !filter.is_empty()
        && filter.len() <= usize::from(u16::MAX)
        && !filter.contains('\0')
        && !filter.starts_with("$share/");
    while let Some(level) = levels.next() {
        valid &= match level {
            "+" => true,
            "#" => levels.peek().is_none(),
            name => !name.contains(['+', '#']),
        };
    }
    valid
}

/// Whether `filter` matches `topic`. That wildcards leave topics with `$` alone is seen to by the broker.
pub fn matches(filter: &str, topic: &str) -> bool {
    let mut levels = topic.split('/');
    for wanted in filter.split('/') {
        match (wanted, levels.next()) {
            ("#", _) => return true,
            ("+", Some(_)) => {}
            (wanted, Some(level)) if wanted == level => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}

/// Whether there is a topic that both filters match. A broker may then send its messages twice.
pub fn overlap(a: &str, b: &str) -> bool {
    let (mut a, mut b) = (a.split('/'), b.split('/'));
    loop {
        match (a.next(), b.next()) {
            (Some("#"), _) | (_, Some("#")) | (None, None) => return true,
            (Some("+"), Some(_)) | (Some(_), Some("+")) => {}
            (Some(one), Some(other)) if one == other => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validity() {
        for filter in ["a", "/", "a//b", "+", "#", "+/a/#", "a/+/b", "$SYS/broker/uptime"] {
            assert!(is_valid(filter), "{filter:?}");
        }
        for filter in ["", "a+", "a/#/b", "a#", "a/b+", "\0", "$share/g/a"] {
            assert!(!is_valid(filter), "{filter:?}");
        }
    }

    #[test]
    fn matching() {
        for (filter, topic, expected) in [
            ("a/+/c", "a/b/c", true),
            ("a/+/c", "a/b/c/d", false),
            ("a/#", "a/b/c", true),
            ("a/#", "a", true),
            ("+", "a", true),
            ("+", "a/b", false),
            ("a/b", "a", false),
        ] {
            assert_eq!(matches(filter, topic), expected, "{filter} {topic}");
        }
    }

    #[test]
    fn overlapping() {
        for (a, b, expected) in [
            ("a/b", "a/b", true),
            ("a/b", "a/c", false),
            ("a/+", "+/b", true),
            ("a/+/c", "a/b", false),
            ("a/#", "a", true),
            ("a/#", "a/b/c", true),
            ("a/b/#", "a/+", true),
            ("a/b/#", "a/c/#", false),
            ("#", "x/y", true),
        ] {
            assert_eq!(overlap(a, b), expected, "{a} {b}");
            assert_eq!(overlap(b, a), expected, "{b} {a}");
        }
    }
}
