//! The list.

/// What a backend does beside the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing: it is a good one.
    Good,
    /// It is silent from this request on.
    Silent(u32),
    /// It ends at this request.
    Dies(u32),
    /// It answers each request just before a frontend loses patience.
    Slow,
    /// It answers every request with a failure.
    Refuses,
    /// Half an answer, then silence.
    Half,
    /// Each answer twice.
    Twice,
    /// Answers that nobody asked for, as many as the socket takes.
    Unasked,
    /// Answers of another size.
    Size,
    /// Answers that announce 4 GiB.
    Huge,
    /// Answers that are no answers by their flags.
    Flags,
    /// Answers to another request.
    Number,
    /// Answers with 32 descriptors each.
    Descriptors,
    /// All 64 bits of features, and of the protocol's.
    Features,
    /// Other features on each connection.
    FeaturesChange,
    /// 2^64 - 1 queues.
    Queues,
    /// No room for memory.
    Slots,
    /// A configuration of random bytes.
    Config,
    /// Another configuration at each look, and notices of it without end.
    ConfigStorm,
    /// A configuration that is shorter than asked for.
    ConfigShort,
    /// Requests that no frontend knows, with descriptors, without end.
    Requests,
    /// An in-flight region without memory.
    InflightShort,
    /// An in-flight region that can be cut off.
    InflightUnsealed,
    /// An in-flight region that is a pipe.
    InflightPipe,
    /// An in-flight region of 2^64 - 1 bytes.
    InflightAbsurd,
    /// An in-flight region that does not come.
    InflightNone,
    /// An in-flight region of garbage.
    InflightGarbage,
    /// Interrupts without end.
    Interrupts,
    /// Errors of the ring without end.
    Errors,
    /// Event descriptors that block: empty ones are drained, full ones filled.
    Blocking,
    /// Garbage in the used ring.
    Used,
    /// The guest's memory is cut off, sealed, or emptied, as far as it can be.
    Memory,
}

/// One behaviour.
#[derive(Clone, Debug)]
pub struct Behaviour {
    /// What people call it.
    pub name: String,
    /// What it does, in a line.
    pub about: String,
    /// The same for the backend.
    pub act: Act,
}

/// The requests of a frontend, in the order in which ours makes them.
const REQUESTS: [(u32, &str); 21] = [
    (1, "get-features"),
    (15, "get-protocol-features"),
    (16, "set-protocol-features"),
    (17, "get-queue-num"),
    (36, "get-max-mem-slots"),
    (21, "set-backend-req-fd"),
    (3, "set-owner"),
    (24, "get-config"),
    (2, "set-features"),
    (37, "add-mem-reg"),
    (31, "get-inflight-fd"),
    (32, "set-inflight-fd"),
    (8, "set-vring-num"),
    (10, "set-vring-base"),
    (9, "set-vring-addr"),
    (12, "set-vring-kick"),
    (13, "set-vring-call"),
    (14, "set-vring-err"),
    (18, "set-vring-enable"),
    (11, "get-vring-base"),
    (34, "reset-device"),
];

const ACTS: [(Act, &str, &str); 30] = [
    (Act::Good, "good", "Nothing: an ordinary backend"),
    (Act::Slow, "slow", "Each answer comes just before a frontend loses patience"),
    (Act::Refuses, "refuses", "Each request that can be is refused"),
    (Act::Half, "half", "Half an answer, then silence"),
    (Act::Twice, "twice", "Each answer comes twice"),
    (Act::Unasked, "unasked", "Answers that nobody asked for, as many as the socket takes"),
    (Act::Size, "size", "Answers of the wrong size"),
    (Act::Huge, "huge", "Answers that announce 4 GiB"),
    (Act::Flags, "flags", "Answers that are none by their flags"),
    (Act::Number, "number", "Answers to another request"),
    (Act::Descriptors, "descriptors", "32 descriptors with each answer"),
    (Act::Features, "features", "All features there could be"),
    (Act::FeaturesChange, "features-change", "Other features on each connection"),
    (Act::Queues, "queues", "2^64 - 1 queues"),
    (Act::Slots, "slots", "No room for memory"),
    (Act::Config, "config", "A configuration of random bytes"),
    (Act::ConfigStorm, "config-storm", "Another configuration at each look, and notices of it without end"),
    (Act::ConfigShort, "config-short", "A configuration that is shorter than asked for"),
    (Act::Requests, "requests", "Requests that no frontend knows, without end"),
    (Act::InflightShort, "inflight-short", "An in-flight region that its file does not have"),
    (Act::InflightUnsealed, "inflight-unsealed", "An in-flight region that can be cut off"),
    (Act::InflightPipe, "inflight-pipe", "A pipe as in-flight region"),
    (Act::InflightAbsurd, "inflight-absurd", "An in-flight region of 2^64 - 1 bytes"),
    (Act::InflightNone, "inflight-none", "An in-flight region without a descriptor"),
    (Act::InflightGarbage, "inflight-garbage", "An in-flight region of garbage"),
    (Act::Interrupts, "interrupts", "Interrupts without end"),
    (Act::Errors, "errors", "Errors of the ring without end"),
    (Act::Blocking, "blocking", "Event descriptors that are drained or filled, and made to block"),
    (Act::Used, "used", "Garbage in the used ring"),
    (Act::Memory, "memory", "Guest memory that is cut off, sealed and emptied, as far as it can be"),
];

/// All of them.
pub fn all() -> Vec<Behaviour> {
    let acts =
        ACTS.iter().map(|(act, name, about)| Behaviour { name: (*name).to_owned(), about: (*about).to_owned(), act: *act });
    let silent = REQUESTS.iter().map(|(request, name)| Behaviour {
        name: format!("silent-{name}"),
        about: "Silence from this request on".to_owned(),
        act: Act::Silent(*request),
    });
    let dies = REQUESTS.iter().map(|(request, name)| Behaviour {
        name: format!("dies-{name}"),
        about: "The end at this request".to_owned(),
        act: Act::Dies(*request),
    });
    acts.chain(silent).chain(dies).collect()
}

/// The one of this name.
pub fn named(name: &str) -> Option<Behaviour> {
    all().into_iter().find(|one| one.name == name)
}
