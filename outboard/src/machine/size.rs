//! Sizes as people write them.

use anyhow::Result;

use crate::usage;

/// Reads `512M`, `2G`, `65536K`. A bare number is refused: it is as often meant as MiB as it is as bytes.
pub fn parse(text: &str) -> Result<u64> {
    let units = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
    let unit = units.iter().find_map(|(letter, shift)| {
        let number = text.strip_suffix(*letter).or_else(|| text.strip_suffix(letter.to_ascii_lowercase()))?;
        number.parse::<u64>().ok()?.checked_mul(1 << shift)
    });
    match unit {
        Some(bytes) => Ok(bytes),
        None => {
            usage!("Cannot read the size `{text}`: write a number and a unit, such as 512M or 2G")
        }
    }
}

/// The shortest exact form.
#[must_use]
pub fn show(bytes: u64) -> String {
    let units = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];
    let exact = units.iter().find(|(_, shift)| bytes >= 1 << shift && bytes.is_multiple_of(1 << shift));
    match exact {
        Some((letter, shift)) => format!("{}{letter}", bytes >> shift),
        None => bytes.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse("512M").unwrap(), 512 << 20);
        assert_eq!(parse("2g").unwrap(), 2 << 30);
        assert_eq!(show(parse("1536M").unwrap()), "1536M");
        for wrong in ["512", "M", "-1M", "1.5G", "99999999999T", ""] {
            let error = parse(wrong).unwrap_err().to_string();
            assert_eq!(error, format!("Cannot read the size `{wrong}`: write a number and a unit, such as 512M or 2G"));
        }
    }
}
