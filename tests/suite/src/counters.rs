//! The page in which a program shows its counters, made by a test that wants to look into it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::{FdFlags, fcntl_setfd};
use virtio::metrics::page;

/// Counters of a program that is started with `--metrics-fd`.
#[derive(Debug)]
pub struct Counters(OwnedFd);

impl Counters {
    /// A page with nothing in it, which every program inherits that is started from now on.
    #[expect(clippy::new_without_default, reason = "it makes a file")]
    pub fn new() -> Counters {
        let page = page::make().expect("a page can be made");
        fcntl_setfd(&page, FdFlags::empty()).expect("it can be inherited");
        Counters(page)
    }

    /// What follows `--metrics-fd`.
    pub fn fd(&self) -> String {
        self.0.as_raw_fd().to_string()
    }

    /// All values of this name.
    pub fn values(&self, name: &str) -> Vec<u64> {
        let shown = page::read(self.0.as_fd());
        shown.into_iter().find(|one| one.name == name).unwrap_or_else(|| panic!("{name}")).values
    }

    /// Their sum.
    pub fn count(&self, name: &str) -> u64 {
        self.values(name).iter().sum()
    }
}
