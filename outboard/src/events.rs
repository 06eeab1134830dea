//! What happens to a machine, said once and heard in two ways: kept as a line of JSON for `outboard events`, and told to the
//! clients of the control socket in QMP's words.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::args::Events;
use crate::journal::Reader;
use crate::machine::disk::Limits;
use crate::machine::size;
use crate::{moment, notices, runtime};

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// The first processor is about to run.
    Started,
    /// A device's process serves it for the first time.
    DeviceConnected,
    /// A successor serves it: nothing was lost.
    DeviceBack,
    /// The connection is gone.
    DeviceLost,
    /// There is a successor, and it cannot go on with the work.
    DeviceDegraded,
    /// A device's process does nothing any more, and is killed if it is to be replaced.
    ProcessHung,
    /// A device's process has ended.
    ProcessEnded,
    /// There is a new one.
    ProcessRestarted,
    /// It is not started again.
    GaveUp,
    /// What was written to a disk so far stays as it is; what comes goes to a new file.
    DiskSnapshot,
    /// What was written to its top image is forgotten.
    DiskReset,
    /// It has grown.
    DiskResized,
    /// It has new limits.
    DiskLimited,
    /// The power button was pressed.
    PowerButton,
    /// The guest reset the machine.
    GuestRebooted,
    /// The guest powered off.
    GuestPoweredOff,
    /// Its kernel panicked.
    GuestPanicked,
    /// Its processor shut down.
    GuestTripleFault,
    /// The machine has ended.
    Ended,
}

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When.
    pub time: String,
    /// What.
    pub event: What,
    /// To which device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Of which process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// How often it was started again by now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<u32>,
    /// The file that a disk goes on in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// How large a disk is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// How much a disk may be used from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// The exit status of `outboard run`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u8>,
    /// Why, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Event {
    /// Now.
    #[must_use]
    pub fn new(event: What) -> Self {
        Self {
            time: moment::now(),
            event,
            device: None,
            pid: None,
            restarts: None,
            file: None,
            bytes: None,
            limits: None,
            status: None,
            reason: None,
        }
    }

    /// To this device.
    #[must_use]
    pub fn of(event: What, device: &str) -> Self {
        Self { device: Some(device.to_owned()), ..Self::new(event) }
    }

    /// With a reason.
    #[must_use]
    pub fn because(self, reason: Option<String>) -> Self {
        Self { reason, ..self }
    }

    /// The name and data of the QMP event, where there is one.
    #[must_use]
    pub fn qmp(&self) -> Option<(&'static str, Value)> {
        let guest = |what: &str| json!({"guest": true, "reason": format!("guest-{what}")});
        let (device_name, pid, restarts, reason) = (&self.device, self.pid, self.restarts, &self.reason);
        let device = |state: &str| json!({"device": device_name, "state": state});
        let process =
            |what: &str| json!({"device": device_name, "what": what, "pid": pid, "restarts": restarts, "reason": reason});
        Some(match self.event {
            What::Started => ("RESUME", json!({})),
            What::DeviceConnected | What::DeviceBack => ("OUTBOARD_DEVICE", device("connected")),
            What::DeviceLost => ("OUTBOARD_DEVICE", device("lost")),
            What::DeviceDegraded => ("OUTBOARD_DEVICE", device("degraded")),
            What::ProcessHung => ("OUTBOARD_PROCESS", process("hung")),
            What::ProcessEnded => ("OUTBOARD_PROCESS", process("ended")),
            What::ProcessRestarted => ("OUTBOARD_PROCESS", process("restarted")),
            What::GaveUp => ("OUTBOARD_PROCESS", process("gave-up")),
            What::DiskSnapshot => ("OUTBOARD_DISK", json!({"device": self.device, "what": "snapshot", "file": self.file})),
            What::DiskReset => ("OUTBOARD_DISK", json!({"device": self.device, "what": "reset"})),
            What::DiskResized => ("OUTBOARD_DISK", json!({"device": self.device, "what": "resized", "bytes": self.bytes})),
            What::DiskLimited => ("OUTBOARD_DISK", json!({"device": self.device, "what": "limited", "limits": self.limits})),
            What::PowerButton => ("POWERDOWN", json!({})),
            What::GuestRebooted => ("RESET", guest("reset")),
            What::GuestPoweredOff => ("SHUTDOWN", guest("shutdown")),
            What::GuestPanicked => ("GUEST_PANICKED", guest("panic")),
            What::GuestTripleFault => ("STOP", guest("triple-fault")),
            What::Ended => return None,
        })
    }

    /// A line for people.
    fn line(&self) -> String {
        let what = serde_json::to_value(self.event).ok();
        let what = what.as_ref().and_then(Value::as_str).unwrap_or_default().replace('-', " ");
        let device = self.device.as_deref().unwrap_or("-");
        let time = self.time.split('.').next().unwrap_or_default().replace('T', " ");
        let more = match (&self.reason, self.pid, self.status) {
            (Some(reason), _, Some(status)) => format!("{reason} Status {status}."),
            (Some(reason), ..) => reason.clone(),
            (None, Some(pid), _) => format!("process {pid}, restart {}", self.restarts.unwrap_or_default()),
            (None, None, _) => self.disk().unwrap_or_default(),
        };
        format!("{time}  {what:<17}  {device:<8}  {more}").trim_end().to_owned()
    }

    /// What a disk is now, for people.
    fn disk(&self) -> Option<String> {
        let file = self.file.as_ref().map(|file| format!("goes on in {}", file.escape_debug()));
        let size = self.bytes.map(|bytes| format!("has {}", size::show(bytes)));
        file.or(size).or_else(|| self.limits.map(|limits| limits.to_string()))
    }
}

/// The command.
pub fn run(args: &Events) -> Result<u8> {
    let (path, runs) = runtime::kept(&args.name, runtime::EVENTS)?;
    let mut reader = Reader::open(path)?;
    while let Some(line) = reader.next(args.follow && runs)? {
        let line = if args.json { line } else { serde_json::from_str(&line).map_or(line, |event: Event| event.line()) };
        if !notices::answer(&format!("{line}\n"))? {
            break;
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_when_what_and_why() {
        let mut event = Event::of(What::ProcessEnded, "root").because(Some("was killed by signal 9".to_owned()));
        event.time = "2026-11-22T10:43:18.123Z".to_owned();
        assert_eq!(event.line(), "2026-11-22 10:43:18  process ended      root      was killed by signal 9");
        let text = serde_json::to_string(&event).unwrap();
        let expected =
            r#"{"time":"2026-11-22T10:43:18.123Z","event":"process-ended","device":"root","reason":"was killed by signal 9"}"#;
        assert_eq!(text, expected);
        assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event);
        let grown = Event { bytes: Some(40 << 30), time: event.time.clone(), ..Event::of(What::DiskResized, "root") };
        assert_eq!(grown.line(), "2026-11-22 10:43:18  disk resized       root      has 40G");
        let moved = Event { file: Some("/vm/a.qcow2".to_owned()), ..Event::of(What::DiskSnapshot, "root") };
        assert!(moved.line().ends_with("  disk snapshot      root      goes on in /vm/a.qcow2"), "{}", moved.line());
    }

    #[test]
    fn clients_of_the_control_socket_hear_it_in_their_words() {
        let (name, data) = Event::of(What::DeviceBack, "root").qmp().unwrap();
        assert_eq!((name, data), ("OUTBOARD_DEVICE", json!({"device": "root", "state": "connected"})));
        assert_eq!(Event::new(What::GuestRebooted).qmp().unwrap().0, "RESET");
        let grown = Event { bytes: Some(4096), ..Event::of(What::DiskResized, "root") };
        let data = json!({"device": "root", "what": "resized", "bytes": 4096});
        assert_eq!(grown.qmp().unwrap(), ("OUTBOARD_DISK", data));
    }
}
