//! `outboard top`: what each process of the running machines uses and does, again and again.
//!
//! Two looks make a rate. The composer adds up and knows nothing of rates, so that every client has its own.

pub mod screen;

use std::collections::BTreeMap;
use std::io::{IsTerminal, stdout};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::args::Top;
use crate::control::client::Client;
use crate::metrics::Stats;
use crate::metrics::usage::Usage;
use crate::{moment, notices, runtime};
use screen::{Key, Screen};

/// One look at the machines.
#[derive(Debug)]
struct Look {
    at: Instant,
    machines: BTreeMap<String, Vec<Stats>>,
}

/// What a process does in a second.
#[derive(Debug, Default)]
struct Rates {
    cpu_percent: f64,
    requests: f64,
    kicks: f64,
    calls: f64,
    bytes: f64,
}

/// The command.
pub fn run(args: &Top) -> Result<u8> {
    let interval = Duration::from_secs_f64(args.interval);
    let mut before = Look::take(args.name.as_deref())?;
    if let Some(name) = &args.name
        && before.machines.is_empty()
    {
        bail!("No machine called `{name}` is running");
    }
    let live = stdout().is_terminal() && !args.once && !args.json;
    let mut screen = if live { Screen::enter()? } else { Screen::none()? };
    if live {
        // At first without rates: an empty screen would look like one that hangs.
        screen.show(&before.text(&before))?;
    }
    loop {
        if screen.wait(interval)? == Key::Leave {
            return Ok(0);
        }
        let now = Look::take(args.name.as_deref())?;
        if args.name.is_some() && now.machines.is_empty() {
            return Ok(0); // it has ended
        }
        let text = if args.json { format!("{}\n", now.json(&before)) } else { now.text(&before) };
        if live {
            screen.show(&text)?;
        } else if !notices::answer(&text)? {
            return Ok(0);
        }
        if args.once {
            return Ok(0);
        }
        before = now;
    }
}

impl Look {
    fn take(name: Option<&str>) -> Result<Self> {
        let base = runtime::base()?;
        let names = runtime::machines(&base)?.into_iter().filter(|found| name.is_none_or(|wanted| wanted == found));
        // A machine that ends just now is no error.
        let ask = |name: &String| {
            let answer = Client::connect(&base.join(name).join(runtime::CONTROL))?.execute("query-outboard-stats")?;
            serde_json::from_value::<Vec<Stats>>(answer).context("The machine's answer is not understood")
        };
        let machines = names.filter_map(|name| Some((name.clone(), ask(&name).ok()?))).collect();
        Ok(Self { at: Instant::now(), machines })
    }

    /// The processes of a machine with what they did since another look.
    fn since<'a>(&'a self, before: &'a Self, machine: &str) -> impl Iterator<Item = (&'a Stats, Rates)> {
        let seconds = self.at.duration_since(before.at).as_secs_f64();
        let old = before.machines.get(machine).map_or(&[][..], Vec::as_slice);
        self.machines.get(machine).into_iter().flatten().map(move |stats| {
            // A process that was started again began at zero; what its predecessor did is not known any more.
            let same = |old: &&Stats| old.process.role == stats.process.role && old.process.pid == stats.process.pid;
            let rates = old.iter().find(same).filter(|_| seconds > 0.0).map(|old| Rates::between(old, stats, seconds));
            (stats, rates.unwrap_or_default())
        })
    }

    fn text(&self, before: &Self) -> String {
        if self.machines.is_empty() {
            return "No machine is running.\n".to_owned();
        }
        let mut text = String::new();
        for name in self.machines.keys() {
            let rows: Vec<_> = self.since(before, name).collect();
            let cpu: f64 = rows.iter().map(|(_, rates)| rates.cpu_percent).sum();
            let private = rows.iter().filter_map(|(stats, _)| stats.usage).map(|usage| usage.private_bytes).sum();
            let heading = format!("{name}: {} processes, {cpu:.1} % CPU, {}B private", rows.len(), amount(private, 1024));
            text.push_str(&format!("{heading}\n{HEADINGS}\n"));
            text.extend(rows.iter().map(|(stats, rates)| row(stats, rates)));
            text.push('\n');
        }
        text.truncate(text.trim_end().len());
        text + "\n"
    }

    fn json(&self, before: &Self) -> Value {
        let process = |(stats, rates): (&Stats, Rates)| {
            let mut value = serde_json::to_value(stats).unwrap_or_default();
            value["rates"] = json!({
                "cpu_percent": rates.cpu_percent, "requests": rates.requests, "kicks": rates.kicks,
                "calls": rates.calls, "bytes": rates.bytes,
            });
            value
        };
        let machine =
            |name: &String| json!({"name": name, "processes": self.since(before, name).map(process).collect::<Vec<_>>()});
        json!({"time": moment::now(), "machines": self.machines.keys().map(machine).collect::<Vec<_>>()})
    }
}

impl Rates {
    fn between(old: &Stats, new: &Stats, seconds: f64) -> Self {
        let grown = |is: &dyn Fn(&str) -> bool| {
            let sum = |stats: &Stats| {
                stats.counters.iter().filter(|(name, _)| is(name)).map(|(_, value)| *value).fold(0, u64::wrapping_add)
            };
            per_second(sum(new).saturating_sub(sum(old)), seconds)
        };
        let cpu = |stats: &Stats| stats.usage.map_or(0.0, |usage| usage.cpu_seconds);
        Self {
            cpu_percent: ((cpu(new) - cpu(old)) / seconds * 100.0).max(0.0),
            requests: grown(&|name| name == "queue_chains"),
            kicks: grown(&|name| name == "queue_kicks"),
            calls: grown(&|name| name == "queue_calls"),
            bytes: grown(&|name| name.ends_with("_bytes") && !name.ends_with("dropped_bytes")),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "53 bits are more than a second's events")]
fn per_second(count: u64, seconds: f64) -> f64 {
    count as f64 / seconds
}

const HEADINGS: &str = "PROCESS    STATE       CPU%    RES   PRIV RST   UP  REQ/S KICK/S CALL/S BYTES/S";

fn row(stats: &Stats, rates: &Rates) -> String {
    let process = &stats.process;
    let usage = |of: fn(&Usage) -> u64| stats.usage.as_ref().map_or_else(|| "-".to_owned(), |usage| amount(of(usage), 1024));
    let counts = |name: &str| stats.counters.contains_key(name);
    let rate = |name: &str, rate: f64, step| if counts(name) { amount(rounded(rate), step) } else { "-".to_owned() };
    format!(
        "{:<10} {:<10} {:>5.1} {:>6} {:>6} {:>3} {:>4} {:>6} {:>6} {:>6} {:>7}\n",
        cut(&process.role, 10),
        cut(&process.state, 10),
        rates.cpu_percent,
        usage(|usage| usage.resident_bytes),
        usage(|usage| usage.private_bytes),
        process.restarts.min(999),
        process.uptime.map_or_else(|| "-".to_owned(), uptime),
        rate("queue_chains", rates.requests, 1000),
        rate("queue_kicks", rates.kicks, 1000),
        rate("queue_calls", rates.calls, 1000),
        rate("queue_chains", rates.bytes, 1024),
    )
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rates are not negative, and a cast saturates")]
fn rounded(rate: f64) -> u64 {
    rate.round() as u64
}

fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['~']).collect()
}

/// Three digits at most, and a unit: `812`, `4.4M`, `17K`.
fn amount(value: u64, step: u64) -> String {
    let units = if step == 1024 { ["", "K", "M", "G", "T", "P"] } else { ["", "k", "M", "G", "T", "P"] };
    let mut scale: u64 = 1;
    for unit in units {
        let whole = value / scale;
        if whole < 1000 {
            let tenth = value % scale * 10 / scale;
            return if unit.is_empty() || whole >= 100 { format!("{whole}{unit}") } else { format!("{whole}.{tenth}{unit}") };
        }
        scale = scale.saturating_mul(step);
    }
    ">999P".to_owned()
}

fn uptime(seconds: u64) -> String {
    match seconds {
        0..100 => format!("{seconds}s"),
        100..6000 => format!("{}m", seconds / 60),
        6000..360_000 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests;
