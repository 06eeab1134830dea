//! How a machine ended: the exit status, and the one sentence that goes with it.

use crate::supervisor::process::Ending;

/// The end of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Of `outboard run`.
    pub status: u8,
    /// What happened.
    pub sentence: String,
}

impl End {
    /// A failure in the composer's own words.
    pub fn failed(sentence: String) -> Self {
        Self { status: 1, sentence }
    }
}

/// Why the composer itself wanted the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// It did not.
    No,
    /// The power button was pressed and the guest had its time.
    PowerOff,
    /// The guest let its time pass.
    Overdue,
    /// At once, by `quit`.
    Now,
    /// At once, by a second signal.
    Killed,
}

/// What the VMM's end means.
pub fn of_vmm(ending: Ending, wanted: Wanted, last_words: Option<String>) -> End {
    let end = |status, sentence: &str| End { status, sentence: sentence.to_owned() };
    match (ending, wanted) {
        (_, Wanted::Overdue) => end(1, "The guest did not power off in time and was ended."),
        (_, Wanted::Killed) => end(1, "The machine was ended before the guest had powered off."),
        (_, Wanted::Now) => end(0, "The machine was ended."),
        (Ending::Exit(0), _) => end(0, "The guest powered off."),
        (Ending::Exit(3), _) => end(3, "The guest rebooted."),
        (Ending::Exit(4), _) => end(4, "The guest's kernel panicked."),
        (Ending::Exit(5), _) => end(5, "The guest's processor shut down (triple fault)."),
        (Ending::Exit(2), _) => End::failed(last_words.unwrap_or_else(|| "The VMM did not understand its arguments.".to_owned())),
        (ending, _) => End::failed(match last_words {
            Some(words) => format!("The VMM failed: {words}"),
            None => format!("The VMM {ending}."),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_its_status() {
        let status = |code| of_vmm(Ending::Exit(code), Wanted::No, None).status;
        assert_eq!([0, 1, 2, 3, 4, 5].map(status), [0, 1, 1, 3, 4, 5]);
        let killed = of_vmm(Ending::Signal(9), Wanted::No, None);
        assert_eq!(killed, End::failed("The VMM was killed by signal 9.".to_owned()));
        assert_eq!(of_vmm(Ending::Signal(9), Wanted::Overdue, None).status, 1);
        assert_eq!(of_vmm(Ending::Exit(0), Wanted::PowerOff, None).sentence, "The guest powered off.");
    }
}
