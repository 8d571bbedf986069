//! Names people give, and names close to a mistyped one.

use crate::FleetError;

/// The rule for names of VMs, templates, images and the parts of a group path.
pub const RULE: &str = "1 to 63 letters, digits, '.', '_' or '-', beginning with a letter or digit";

/// True when `text` obeys [`RULE`].
pub fn is_valid(text: &str) -> bool {
    text.len() <= 63
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Checks a name.
///
/// # Errors
/// `InvalidName` with the rule.
pub fn check(what: &'static str, text: &str) -> Result<(), FleetError> {
    if is_valid(text) { Ok(()) } else { Err(FleetError::InvalidName { what, name: text.to_string(), rule: RULE }) }
}

/// At most five of `known` that are close to `text`, the closest first.
pub fn near<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let wanted = text.to_lowercase();
    // a third of the letters may be wrong, two always
    let limit = (wanted.chars().count() / 3).max(2);
    let mut found: Vec<(usize, &str)> = known
        .into_iter()
        .filter_map(|name| {
            let lower = name.to_lowercase();
            let distance = distance(&wanted, &lower);
            if distance <= limit {
                Some((distance, name))
            } else if wanted.len() >= 3 && (lower.contains(&wanted) || wanted.contains(&lower)) {
                Some((limit + 1, name))
            } else {
                None
            }
        })
        .collect();
    found.sort();
    found.dedup_by(|a, b| a.1 == b.1);
    found.into_iter().take(5).map(|(_, name)| name.to_string()).collect()
}

/// Edits (insert, remove, replace) between two texts; texts are short, so quadratic is good enough.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_name_finds_the_right_one_first() {
        let known = ["lab1-01", "lab1-02", "lab2-01", "office"];
        assert_eq!(near("lab1-o1", known)[0], "lab1-01");
        assert_eq!(near("Office", known), ["office"]);
        assert_eq!(near("completely-else", known), Vec::<String>::new());
    }

    #[test]
    fn names_are_checked() {
        for good in ["a", "lab1-01", "Debian_12.7"] {
            assert!(is_valid(good), "{good}");
        }
        for bad in ["", "-x", ".x", "a b", "a/b", "ä", &"x".repeat(64)] {
            assert!(!is_valid(bad), "{bad}");
        }
    }
}
