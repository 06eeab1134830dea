//! Moments as people and machines write them: RFC 3339, in UTC. Written so, they sort as text.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY: u64 = 86_400;

/// Now.
#[must_use]
pub fn now() -> String {
    show(SystemTime::now())
}

/// `2026-11-22T10:43:18.123Z`
#[must_use]
pub fn show(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / DAY, since.as_secs() % DAY);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
}

/// Year, month and day so many days after 1970 began. Years that begin in March have their leap day at the end.
fn date(days: u64) -> (u64, u64, u64) {
    const FROM_MARCH_OF_YEAR_0: u64 = 719_468;
    const FOUR_CENTURIES: u64 = 146_097;
    let days = days + FROM_MARCH_OF_YEAR_0;
    let (era, day) = (days / FOUR_CENTURIES, days % FOUR_CENTURIES);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, year) = if month < 10 { (month + 3, year) } else { (month - 9, year + 1) };
    (year + era * 400, month, day)
}

/// A moment in the past: `90s`, `5m`, `2h` or `1d` ago, or the beginning of one as [`show`] writes it.
pub fn since(text: &str) -> Result<String, String> {
    let units = [('s', 1), ('m', 60), ('h', 3600), ('d', DAY)];
    let ago = units.iter().find_map(|(unit, seconds)| text.strip_suffix(*unit)?.parse::<u64>().ok()?.checked_mul(*seconds));
    if let Some(ago) = ago {
        let then = SystemTime::now().checked_sub(Duration::from_secs(ago));
        return Ok(show(then.unwrap_or(UNIX_EPOCH)));
    }
    let form = "0000-00-00T00:00:00.000Z";
    let fits = |(have, want): (char, char)| if want == '0' { have.is_ascii_digit() } else { have == want };
    if text.len() >= 4 && text.len() <= form.len() && text.chars().zip(form.chars()).all(fits) {
        return Ok(text.to_owned());
    }
    Err("write 90s, 5m, 2h or 1d, or a moment such as 2026-11-22T10:43 (UTC)".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_fall_where_the_calendar_has_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_799, "2000-02-29T23:59:59.000Z"),
            (1_795_344_898, "2026-11-22T10:54:58.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(show(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn moments_in_the_past() {
        assert!(since("1h").unwrap() < now() && since("2h").unwrap() < since("1h").unwrap());
        assert_eq!(since("2026-11-22T10:43").unwrap(), "2026-11-22T10:43");
        assert!(since("2026-11-22T10:43").unwrap().as_str() < "2026-11-22T10:43:00.001Z");
        for wrong in ["", "yesterday", "5", "5x", "26-11", "2026-11-22 10:43", "m"] {
            assert!(since(wrong).is_err(), "{wrong}");
        }
    }
}
