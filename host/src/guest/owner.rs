//! Which instance owns a key, when a guest is run in several.
//!
//! The same for requests, appends and replay, whatever guest serves: a key never moves while the process lives. After the next
//! start it may be another, since nothing rests on it then.

use std::hash::{Hash, Hasher};

use kvs_runtime::Random;
use siphasher::sip::SipHasher13;

/// Shares the keys out to instances.
#[derive(Clone)]
pub struct Owners {
    count: usize,
    /// Unknown outside, so that nobody can choose many keys with one owner.
    hasher: SipHasher13,
}

/// What one instance owns.
#[derive(Clone)]
pub struct Part {
    owners: Owners,
    index: usize,
}

impl Owners {
    pub fn new(count: usize, random: &Random) -> anyhow::Result<Self> {
        let mut key = [0; 16];
        random.fill(&mut key)?;
        Ok(Self { count, hasher: SipHasher13::new_with_key(&key) })
    }

    /// The number of instances.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The number of the instance that owns a key.
    pub fn of(&self, key: &str) -> usize {
        let mut hasher = self.hasher;
        tag(key).hash(&mut hasher);
        // Spread over the instances as evenly as the hashes, without a division.
        ((u128::from(hasher.finish()) * self.count as u128) >> 64) as usize
    }

    /// What the instance of this number owns.
    pub fn part(&self, index: usize) -> Part {
        Part { owners: self.clone(), index }
    }

    pub fn parts(&self) -> impl Iterator<Item = Part> {
        (0..self.count).map(|index| self.part(index))
    }
}

impl Part {
    /// Whether there is nothing else.
    pub fn is_all(&self) -> bool {
        self.owners.count == 1
    }

    /// Index in log lines; none where it is the only one.
    pub fn label(&self) -> Option<usize> {
        (!self.is_all()).then_some(self.index)
    }

    pub fn owns(&self, key: &str) -> bool {
        self.is_all() || self.owners.of(key) == self.index
    }
}

/// What a key is placed by: its first `{tag}`, or all of it.
fn tag(key: &str) -> &str {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    tag.filter(|tag| !tag.is_empty()).unwrap_or(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_placed_by_its_first_tag() {
        for (key, placed_by) in [
            ("{cart7}:items", "cart7"),
            ("items of {cart7} and {cart8}", "cart7"),
            ("plain", "plain"),
            ("{}", "{}"),
            ("{}{a}", "{}{a}"),
            ("{open", "{open"),
            ("close}", "close}"),
            ("}{a}", "a"),
            ("{{a}}", "{a"),
        ] {
            assert_eq!(tag(key), placed_by, "{key}");
        }
    }

    #[test]
    fn each_key_has_one_owner_and_each_owner_its_share() {
        let owners = Owners::new(7, &Random::system()).unwrap();
        let mut shares = [0; 7];
        for n in 0..7_000 {
            let (key, related) = (n.to_string(), format!("{{{n}}}:more"));
            let owning: Vec<_> = owners.parts().filter(|part| part.owns(&key)).map(|part| part.index).collect();
            assert_eq!(owning, [owners.of(&key)]);
            assert_eq!(owners.of(&related), owners.of(&key));
            shares[owners.of(&key)] += 1;
        }
        assert!(shares.iter().all(|share| (800..1_200).contains(share)), "{shares:?}");
    }

    #[test]
    fn one_instance_owns_everything() {
        let owners = Owners::new(1, &Random::system()).unwrap();
        assert!(owners.parts().all(|part| part.is_all() && part.owns("a")));
        assert_eq!(owners.of("a"), 0);
    }
}
