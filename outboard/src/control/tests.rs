//! Conversations with the control socket, as clients of QEMU lead them.

use std::io::{BufRead, BufReader};

use super::report::Report;
use super::*;

struct Example;

impl Machine for Example {
    fn answer(&self, _ask: Ask) -> Value {
        serde_json::to_value(Report::example()).unwrap()
    }
}

struct Conversation {
    server: Server,
    client: UnixStream,
    answers: BufReader<UnixStream>,
}

fn conversation(name: &str) -> Conversation {
    let path = std::env::temp_dir().join(format!("outboard-qmp-{name}-{}", std::process::id()));
    drop(std::fs::remove_file(&path));
    let mut server = Server::new(&path).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    server.accept();
    let answers = BufReader::new(client.try_clone().unwrap());
    Conversation { server, client, answers }
}

impl Conversation {
    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn say(&mut self, text: &str) -> (Value, Vec<Wish>) {
        writeln!(self.client, "{text}").unwrap();
        let wishes = self.server.hear(0, &Example);
        (self.answer(), wishes)
    }
}

#[test]
fn a_client_negotiates_first_as_with_qemu() {
    let mut talk = conversation("negotiate");
    assert!(talk.answer()["QMP"]["version"]["qemu"].is_object());
    let (refused, wishes) = talk.say(r#"{"execute":"quit"}"#);
    assert_eq!(refused["error"]["class"], "CommandNotFound");
    assert!(wishes.is_empty());
    assert_eq!(talk.say(r#"{"execute":"qmp_capabilities","id":7}"#).0, json!({"return": {}, "id": 7}));
    assert_eq!(talk.say(r#"{"execute":"query-status"}"#).0["return"]["running"], true);
    assert_eq!(talk.say(r#"{"execute":"system_powerdown"}"#).1, [Wish::PowerButton]);
    assert_eq!(talk.say(r#"{"execute":"nonsense"}"#).0["error"]["class"], "CommandNotFound");
    assert_eq!(talk.say("{").0["error"]["desc"], "This is not JSON");
    assert_eq!(talk.say(r#"{"execute":"query-outboard"}"#).0["return"]["name"], "example");
}

#[test]
fn a_client_that_sends_without_end_is_dropped() {
    let mut talk = conversation("endless");
    talk.client.set_nonblocking(true).unwrap();
    for _ in 0..40 {
        drop(talk.client.write(&[b'x'; 4096]));
        assert!(talk.server.hear(0, &Example).is_empty());
    }
    talk.server.sweep();
    assert!(talk.server.0.iter().next().is_none());
}

#[test]
fn events_reach_only_those_who_negotiated() {
    let mut talk = conversation("events");
    talk.answer();
    talk.server.announce("RESET", &json!({}));
    talk.say(r#"{"execute":"qmp_capabilities"}"#);
    talk.server.announce("POWERDOWN", &json!({}));
    assert_eq!(talk.answer()["event"], "POWERDOWN");
}
