//! The log: lines on standard error, for people or for machines, and a limit on those that others can cause.

use std::io::stderr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{LevelFilter, dynamic_filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt};

use crate::args::{Base, LogFormat};
use crate::syslog;

/// The target of lines that a guest or a peer can cause at will.
const GUEST: &str = "guest";

/// Lines of that kind in a row before the limit bites. Enough to see what is going on.
const BURST: u32 = 20;

/// After the burst, one line in this time: a hostile guest writes less than 10 MB of log in a day.
const REFILL: Duration = Duration::from_secs(1);

/// Starts the log of this process: on standard error, or as `syslog` of that name.
///
/// # Errors
/// When the host takes no lines.
pub(crate) fn start(base: &Base, syslog: Option<&str>) -> Result<()> {
    let host = syslog.map(syslog::connect).transpose()?;
    let limit = Limit::new();
    let format = base.log_format;
    let allowed = dynamic_filter_fn(move |metadata: &Metadata<'_>, _: &_| metadata.target() != GUEST || limit.allows(format));
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match (format, host) {
        (LogFormat::Text, Some(host)) => {
            fmt::layer().without_time().with_target(false).with_level(false).with_ansi(false).with_writer(host).boxed()
        }
        (LogFormat::Json, Some(host)) => fmt::layer().json().flatten_event(true).with_writer(host).boxed(),
        (LogFormat::Text, None) => fmt::layer().without_time().with_target(false).with_ansi(false).with_writer(stderr).boxed(),
        (LogFormat::Json, None) => fmt::layer().json().flatten_event(true).with_writer(stderr).boxed(),
    };
    let level = LevelFilter::from_level(base.log_level.level());
    // A second start in one process (tests) keeps the first.
    let _already_started = tracing_subscriber::registry().with(lines.with_filter(allowed).with_filter(level)).try_init();
    Ok(())
}

/// A bucket of lines.
#[derive(Debug)]
struct Limit(Mutex<Bucket>);

#[derive(Debug)]
struct Bucket {
    left: u32,
    refilled: Instant,
    suppressed: u64,
}

impl Limit {
    fn new() -> Limit {
        Limit(Mutex::new(Bucket { left: BURST, refilled: Instant::now(), suppressed: 0 }))
    }

    fn allows(&self, format: LogFormat) -> bool {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let suppressed = bucket.take(Instant::now());
        if let Some(count) = suppressed.filter(|count| *count > 0) {
            say_suppressed(format, count);
        }
        suppressed.is_some()
    }
}

impl Bucket {
    /// One line. `None`: not now. Otherwise how many were left out before it.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let steps = now.duration_since(self.refilled).as_millis() / REFILL.as_millis();
        if let Some(steps) = u32::try_from(steps).ok().filter(|steps| *steps > 0) {
            self.left = self.left.saturating_add(steps).min(BURST);
            self.refilled = now;
        }
        if self.left == 0 {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

fn say_suppressed(format: LogFormat, count: u64) {
    if let Some(host) = syslog::connected() {
        return host.say(Level::WARN, &format!("{count} lines of this kind were left out"));
    }
    match format {
        LogFormat::Text => eprintln!(" {} {count} lines of this kind were left out", Level::WARN),
        LogFormat::Json => {
            eprintln!("{}", serde_json::json!({"level": "WARN", "message": "lines were left out", "count": count}));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let start = Instant::now();
        let mut bucket = Bucket { left: BURST, refilled: start, suppressed: 0 };
        let written = (0..1000).filter(|_| bucket.take(start).is_some()).count();
        assert_eq!(written, BURST as usize);
        assert_eq!(bucket.take(start + REFILL), Some(1000 - u64::from(BURST)));
        assert_eq!(bucket.take(start + REFILL), None);
        let rested = start + REFILL * 1000;
        assert_eq!(
            (0..1000).filter(|_| bucket.take(rested).is_some()).count(),
            BURST as usize,
            "no more than a burst is saved up"
        );
    }
}
