//! What the user probably meant.

/// The candidate that is a slip of the finger away from `word`, if one is.
#[must_use]
pub fn nearest<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    // One slip in three letters is a typo, more is another word.
    let limit = word.chars().count().div_ceil(3);
    let mut ranked: Vec<(usize, &str)> = candidates.iter().map(|name| (distance(word, name), *name)).collect();
    ranked.sort_by_key(|(distance, _)| *distance);
    ranked.first().filter(|(distance, _)| *distance <= limit).map(|(_, name)| *name)
}

/// How many insertions, deletions, replacements and swaps of neighbours lead from one word to the other.
fn distance(from: &str, to: &str) -> usize {
    let from: Vec<char> = from.chars().collect();
    let to: Vec<char> = to.chars().collect();
    let mut table = vec![vec![0_usize; to.len() + 1]; from.len() + 1];
    for i in 0..=from.len() {
        for j in 0..=to.len() {
            table[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replaced = table[i - 1][j - 1] + usize::from(from[i - 1] != to[j - 1]);
                let best = replaced.min(table[i - 1][j] + 1).min(table[i][j - 1] + 1);
                let swapped = i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1];
                if swapped { best.min(table[i - 2][j - 2] + 1) } else { best }
            };
        }
    }
    table[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typos_find_their_word_and_other_words_do_not() {
        let keys = ["path", "format", "readonly", "queues", "serial"];
        assert_eq!(nearest("fromat", &keys), Some("format"));
        assert_eq!(nearest("read-only", &keys), Some("readonly"));
        assert_eq!(nearest("pth", &keys), Some("path"));
        assert_eq!(nearest("colour", &keys), None);
    }
}
