//! A table for people: columns as wide as their widest cell, two spaces between them.

/// Lays out rows; the first one is the heading.
#[must_use]
pub fn layout(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The width people's terminals have at least.
const WIDTH: usize = 80;

/// Text after a heading, broken at words to fit a terminal, its further lines below its first.
#[must_use]
pub fn wrap(head: &str, text: &str) -> String {
    let indent = head.chars().count();
    let mut lines = vec![head.to_owned()];
    for word in text.split_whitespace() {
        let column = lines.last().map_or(0, |line| line.chars().count());
        if column > indent && column + 1 + word.chars().count() > WIDTH {
            lines.push(" ".repeat(indent));
        }
        if let Some(line) = lines.last_mut() {
            if line.chars().count() > indent {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines.iter().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_broken_at_words() {
        let text = wrap("name  ", &"word ".repeat(20));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|line| line.len() <= WIDTH));
        assert!(lines[0].starts_with("name  word") && lines[1].starts_with("      word"), "{text}");
        assert_eq!(wrap("name  ", "x"), "name  x\n");
    }

    #[test]
    fn columns_line_up() {
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect();
        let text = layout(&[row(&["A", "LONG"]), row(&["abc", "x"])]);
        assert_eq!(text, "A    LONG\nabc  x\n");
    }
}
