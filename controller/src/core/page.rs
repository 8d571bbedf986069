//! Lists in pages. A cursor is the sort key of the last item: what is added or removed in between is neither shown twice nor
//! hides others.

use muster_api::Page;

use crate::refusal::Refusal;

const DEFAULT_LIMIT: u32 = 100;
const MAX_LIMIT: u32 = 1000;

/// The checked page size.
pub fn limit_of(limit: Option<u32>) -> Result<usize, Refusal> {
    match limit.unwrap_or(DEFAULT_LIMIT) {
        n @ 1..=MAX_LIMIT => Ok(n as usize),
        n => Err(Refusal::invalid(format!("limit is {n}: it must be 1 to {MAX_LIMIT}"))),
    }
}

/// One page of `items`, sorted by `key`.
pub fn paginate<T>(
    mut items: Vec<T>,
    key: impl Fn(&T) -> String,
    cursor: Option<&str>,
    limit: Option<u32>,
) -> Result<Page<T>, Refusal> {
    let limit = limit_of(limit)?;
    items.sort_by_cached_key(&key);
    if let Some(cursor) = cursor {
        items.retain(|item| key(item).as_str() > cursor);
    }
    let more = items.len() > limit;
    items.truncate(limit);
    let next = if more { items.last().map(&key) } else { None };
    Ok(Page { items, next })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_everything_once() {
        let all: Vec<String> = (0..25).map(|n| format!("item-{n:02}")).collect();
        let (mut seen, mut cursor) = (Vec::new(), None);
        loop {
            let page = paginate(all.clone(), Clone::clone, cursor.as_deref(), Some(10)).unwrap();
            seen.extend(page.items);
            match page.next {
                None => break,
                next => cursor = next,
            }
        }
        assert_eq!(seen, all);
        assert!(paginate(all.clone(), Clone::clone, None, Some(0)).is_err());
        assert!(paginate(all, Clone::clone, None, Some(1001)).is_err());
    }
}
