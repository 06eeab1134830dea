//! What can be asked about a disk, in QMP's words where it has some.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::machine::disk::Rate;

/// The commands.
pub const COMMANDS: [&str; 5] =
    ["block_resize", "block_set_io_throttle", "blockdev-snapshot-sync", "outboard-disk-reset", "query-outboard-disk"];

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// What it is, and what it consists of: `query-outboard-disk`
    Status,
    /// A larger disk: `block_resize`
    Resize(u64),
    /// How much it may be used, where that is to change: `block_set_io_throttle`
    Limit {
        /// Requests.
        operations: Option<Rate>,
        /// Bytes.
        bytes: Option<Rate>,
    },
    /// From now on everything is written to a new file: `blockdev-snapshot-sync`
    Snapshot(PathBuf),
    /// What was written to the top image is forgotten: `outboard-disk-reset`
    Reset,
}

/// Reads a command that has to do with a disk: the disk's name, and what is asked. `None`: it is another one.
#[must_use]
pub fn read(command: &str, arguments: Option<&Value>) -> Option<Result<(String, Request), String>> {
    if !COMMANDS.contains(&command) {
        return None;
    }
    let mut given = Arguments(arguments.and_then(Value::as_object).cloned().unwrap_or_default());
    Some(given.request(command).and_then(|(device, request)| given.end().map(|()| (device, request))))
}

/// Those that nobody has looked at yet.
struct Arguments(Map<String, Value>);

impl Arguments {
    fn request(&mut self, command: &str) -> Result<(String, Request), String> {
        let device = self.text("device")?.ok_or("Parameter 'device' is missing")?;
        let request = match command {
            "block_resize" => Request::Resize(self.number("size")?.ok_or("Parameter 'size' is missing")?),
            "block_set_io_throttle" => self.limit()?,
            "blockdev-snapshot-sync" => self.snapshot()?,
            "outboard-disk-reset" => Request::Reset,
            _ => Request::Status,
        };
        Ok((device, request))
    }

    fn snapshot(&mut self) -> Result<Request, String> {
        let path = PathBuf::from(self.text("snapshot-file")?.ok_or("Parameter 'snapshot-file' is missing")?);
        if !path.is_absolute() {
            return Err("Parameter 'snapshot-file' must be an absolute path: the composer stands elsewhere than you".to_owned());
        }
        if self.text("format")?.is_some_and(|format| format != "qcow2") {
            return Err("Parameter 'format' can only be 'qcow2'".to_owned());
        }
        if self.text("mode")?.is_some_and(|mode| mode != "absolute-paths") {
            return Err("Parameter 'mode' can only be 'absolute-paths': a file that is there is never used".to_owned());
        }
        Ok(Request::Snapshot(path))
    }

    fn limit(&mut self) -> Result<Request, String> {
        for name in ["iops_rd", "iops_wr", "bps_rd", "bps_wr"] {
            if self.number(name)?.is_some_and(|limit| limit != 0) {
                return Err(format!("Parameter '{name}' can only be 0: reads and writes are limited together"));
            }
        }
        Ok(Request::Limit { operations: self.rate("iops", "iops_max")?, bytes: self.rate("bps", "bps_max")? })
    }

    fn rate(&mut self, rate: &str, burst: &str) -> Result<Option<Rate>, String> {
        let (per_second, most) = (self.number(rate)?, self.number(burst)?);
        match (per_second, most) {
            (None | Some(0), Some(1..)) => Err(format!("Parameter '{burst}' needs '{rate}'")),
            (per_second, most) => Ok(per_second.map(|per_second| Rate { per_second, burst: most.unwrap_or(0) })),
        }
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, String> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(format!("Parameter '{name}' must be text")),
        }
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, String> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(value) => {
                value.as_u64().map(Some).ok_or_else(|| format!("Parameter '{name}' must be a number that is not negative"))
            }
        }
    }

    fn end(&self) -> Result<(), String> {
        self.0.keys().next().map_or(Ok(()), |name| Err(format!("Parameter '{name}' is unexpected")))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn commands_of_qemu_mean_what_they_mean_there() {
        let said = |command: &str, arguments: Value| read(command, Some(&arguments)).unwrap();
        let of_root = |request| Ok(("root".to_owned(), request));
        assert!(read("query-status", None).is_none());
        assert_eq!(said("query-outboard-disk", json!({"device": "root"})), of_root(Request::Status));
        assert_eq!(said("block_resize", json!({"device": "root", "size": 4096})), of_root(Request::Resize(4096)));
        let snapshot = json!({"device": "root", "snapshot-file": "/x", "format": "qcow2", "mode": "absolute-paths"});
        assert_eq!(said("blockdev-snapshot-sync", snapshot), of_root(Request::Snapshot("/x".into())));
        let throttle =
            json!({"device": "root", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 50, "iops_rd": 0, "iops_wr": 0, "iops_max": 9});
        let limit = Request::Limit { operations: Some(Rate { per_second: 50, burst: 9 }), bytes: Some(Rate::default()) };
        assert_eq!(said("block_set_io_throttle", throttle), of_root(limit));
        assert_eq!(said("outboard-disk-reset", json!({"device": "root"})), of_root(Request::Reset));
        for (command, arguments, says) in [
            ("outboard-disk-reset", json!({}), "Parameter 'device' is missing"),
            ("outboard-disk-reset", json!({"device": 1}), "Parameter 'device' must be text"),
            ("outboard-disk-reset", json!({"device": "a", "x": 1}), "Parameter 'x' is unexpected"),
            ("block_resize", json!({"device": "a", "size": -1}), "Parameter 'size' must be a number that is not negative"),
            (
                "block_set_io_throttle",
                json!({"device": "a", "bps_rd": 5}),
                "Parameter 'bps_rd' can only be 0: reads and writes are limited together",
            ),
            ("block_set_io_throttle", json!({"device": "a", "bps_max": 5}), "Parameter 'bps_max' needs 'bps'"),
            (
                "blockdev-snapshot-sync",
                json!({"device": "a", "snapshot-file": "/x", "format": "raw"}),
                "Parameter 'format' can only be 'qcow2'",
            ),
        ] {
            assert_eq!(said(command, arguments), Err(says.to_owned()));
        }
        assert!(said("blockdev-snapshot-sync", json!({"device": "a", "snapshot-file": "x"})).is_err());
    }
}
