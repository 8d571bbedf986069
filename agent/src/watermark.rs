//! When to say that the store fills up. Pure; telemetry feeds it each second.

/// Parts of the budget, in percent, that are told when they are passed on the way up.
const MARKS: [u8; 3] = [80, 90, 95];
/// A mark counts as left on the way down only this far below it: a store that hovers at a mark is told of once.
const SLACK: u8 = 2;

/// What was told last: the highest mark passed, 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watermark(u8);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crossing {
    /// This mark was passed on the way up.
    Above(u8),
    /// What is used fell below this one, the lowest mark that was left.
    Below(u8),
}

impl Watermark {
    /// Takes in what is used of the budget; the crossing to tell, if there is one.
    pub fn observe(&mut self, used: u64, budget: u64) -> Option<Crossing> {
        let reached = |mark: u8, slack: u8| u128::from(used) * 100 >= u128::from(budget) * u128::from(mark - slack);
        let up = MARKS.into_iter().rfind(|mark| reached(*mark, 0)).unwrap_or(0);
        if up > self.0 {
            self.0 = up;
            return Some(Crossing::Above(up));
        }
        let still = MARKS.into_iter().rfind(|mark| *mark <= self.0 && reached(*mark, SLACK)).unwrap_or(0);
        if still < self.0 {
            let left = MARKS.into_iter().find(|mark| *mark > still).unwrap_or(self.0);
            self.0 = still;
            return Some(Crossing::Below(left));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mark_is_told_once_on_the_way_up_and_once_when_it_is_well_left() {
        let mut mark = Watermark::default();
        let told: Vec<_> = [10, 79, 80, 81, 79, 80, 90, 89, 88, 87, 96, 99, 50, 95]
            .into_iter()
            .filter_map(|percent| mark.observe(percent, 100))
            .collect();
        use Crossing::{Above, Below};
        assert_eq!(told, [Above(80), Above(90), Below(90), Above(95), Below(80), Above(95)]);
    }

    #[test]
    fn hovering_at_a_mark_is_told_once() {
        let mut mark = Watermark::default();
        let told = (0..1000).filter_map(|n| mark.observe(8999 + n % 3, 10_000)).count();
        assert_eq!(told, 2, "80 at once, then 90");
    }

    #[test]
    fn no_budget_overflows() {
        assert_eq!(Watermark::default().observe(u64::MAX, u64::MAX), Some(Crossing::Above(95)));
    }
}
