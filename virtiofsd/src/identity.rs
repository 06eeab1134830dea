//! As whom a thread makes files.
//!
//! Who owns a new file is told by the thread's effective ids; nothing else depends on them, since what a guest's user may do is
//! decided in the guest, and the thread's capabilities do not change with its ids. So a thread changes them only where it makes something, and only if
//! it was somebody else before. After an error it goes back to what it was at the start.

use rustix::fs::{Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use sandbox::Capability;

/// Ids of a thread, as it has them at the moment.
#[derive(Debug)]
pub struct Credentials {
    /// Whether there is a choice at all.
    several: bool,
    uid: u32,
    gid: u32,
    group: Option<u32>,
    umask: u32,
}

impl Credentials {
    /// Those of a thread that has changed nothing yet. `several`: the process may be more than one user.
    pub fn new(several: bool) -> Credentials {
        Credentials { several, uid: 0, gid: 0, group: None, umask: 0 }
    }

    /// Becomes this user.
    ///
    /// # Errors
    /// `EPERM` when there is no such user here. The thread is who it was at the start then.
    pub fn become_user(&mut self, uid: u32, gid: u32, group: Option<u32>) -> Result<(), Errno> {
        if !self.several {
            return if (uid, gid) == (0, 0) { Ok(()) } else { Err(Errno::PERM) };
        }
        let became = self.set_group(group).and_then(|()| self.set_gid(gid)).and_then(|()| self.set_uid(uid));
        became.map_err(|_| {
            self.come_back();
            Errno::PERM
        })
    }

    /// Is again who it was at the start.
    pub fn come_back(&mut self) {
        let back = self.set_uid(0).and(self.set_gid(0)).and(self.set_group(None));
        // Nobody may go on as somebody else: the right to change ids cannot have gone, so this is the end of the process.
        if back.is_err() {
            tracing::error!("A thread cannot become itself again");
            sandbox::exit(1);
        }
    }

    /// What new files are not to have.
    pub fn mask(&mut self, umask: u32) {
        let umask = umask & 0o777;
        if umask != self.umask {
            rustix::process::umask(Mode::from_raw_mode(umask));
            self.umask = umask;
        }
    }

    /// Does something, where this is so with the right to keep set-user-id and set-group-id bits, which no thread has otherwise.
    pub fn keeping_ids_if<T>(&mut self, keep: bool, act: impl FnOnce() -> T) -> T {
        let raised = keep && self.several && sandbox::raise(&[Capability::CAP_FSETID]).is_ok();
        let done = act();
        if raised {
            let _it_was_lowered_before = sandbox::lower(&[Capability::CAP_FSETID]);
        }
        done
    }

    fn set_uid(&mut self, uid: u32) -> Result<(), Errno> {
        if uid != self.uid {
            set_thread_res_uid(None, Some(Uid::from_raw(uid)), None)?;
            self.uid = uid;
        }
        Ok(())
    }

    fn set_gid(&mut self, gid: u32) -> Result<(), Errno> {
        if gid != self.gid {
            set_thread_res_gid(None, Some(Gid::from_raw(gid)), None)?;
            self.gid = gid;
        }
        Ok(())
    }

    fn set_group(&mut self, group: Option<u32>) -> Result<(), Errno> {
        if group != self.group {
            set_thread_groups(group.map(Gid::from_raw).as_slice())?;
            self.group = group;
        }
        Ok(())
    }
}
