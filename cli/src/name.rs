//! Names for sandboxes that nobody has named: readable, and hardly ever taken.

use rustix::rand::{GetRandomFlags, getrandom};

const MANNERS: [&str; 32] = [
    "able", "amber", "bold", "brave", "brisk", "calm", "clever", "cosy", "deft", "eager", "fair", "fond",
    "gentle", "glad", "happy", "jolly", "keen", "kind", "lively", "lucky", "mellow", "merry", "neat",
    "nimble", "proud", "quick", "quiet", "sunny", "swift", "tidy", "warm", "wise",
];

const ANIMALS: [&str; 32] = [
    "badger", "bear", "beaver", "bison", "crane", "deer", "dormouse", "eagle", "falcon", "ferret", "finch",
    "fox", "gecko", "hare", "heron", "ibex", "jackdaw", "lark", "lynx", "marten", "mole", "newt", "otter",
    "owl", "panda", "puffin", "raven", "robin", "seal", "stork", "vole", "wren",
];

/// A new name.
pub fn generate() -> String {
    let mut random = [0; 4];
    // Without random bytes, names meet earlier, and `create` says so.
    let _ = getrandom(&mut random, GetRandomFlags::empty());
    from_bytes(random)
}

fn from_bytes([manner, animal, first, second]: [u8; 4]) -> String {
    let pick =
        |words: &[&'static str; 32], byte: u8| words.get(usize::from(byte % 32)).copied().unwrap_or_default();
    format!("{}-{}-{first:02x}{second:02x}", pick(&MANNERS, manner), pick(&ANIMALS, animal))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_names_and_differ() {
        assert_eq!(from_bytes([0, 255, 0, 171]), "able-wren-00ab");
        let words: HashSet<_> = MANNERS.iter().chain(&ANIMALS).collect();
        assert_eq!(words.len(), 64);
        assert!(words.iter().all(|word| word.bytes().all(|byte| byte.is_ascii_lowercase())));
        let names: HashSet<String> = (0..100).map(|_| generate()).collect();
        assert!(names.len() > 95, "{names:?}");
    }
}
