//! virtio-fs (virtio 1.3, 5.11): a directory of the host, shared with a guest.
//!
//! # Theory of operation
//!
//! ```text
//! queue ---- fetch, once ----> request (checked) ----> share: tree, files, directories ----> answer
//!   ^                              |  would wait?                                              |
//!   +------ finish <---- pool <----+   for a disk, another machine: pool; for a lock: waiting   |
//!   +------------------------------------------------------------------------------------------+
//! ```
//!
//! A guest's kernel puts FUSE messages into the queues. One thread serves each queue, and does what need not wait then and there; what
//! would have to wait goes to a few other threads, so no request holds up the share.
//!
//! | file | what lives there | who may write it |
//! |---|---|---|
//! | [`args`] | arguments as they are written, and what they mean | - |
//! | [`abi`] | numbers of the protocol | - |
//! | [`request`] | guest bytes to a checked request; no I/O; the fuzz target | the thread of the queue, its scratch |
//! | [`reply`] | what the guest is told, as bytes | - |
//! | [`queue`] | a request in, its answer out | the thread of the queue |
//! | [`pool`], [`waiting`] | threads for what may have to wait | any thread, under a lock |
//! | [`fs`] | what is done with a share | - |
//! | `tree` | inodes and open files: what a successor has to know | any thread, a part of it under a lock |
//! | [`owner`], [`identity`] | whose files are whose; as whom a thread makes them | the thread |
//! | [`state`] | what goes to a server on another host, as bytes; a fuzz target | - |
//! | [`share`] | the share, before and after the process is confined | - |
//! | [`xattrmap`] | names of attributes that are others on the host |
//! | `magic` | the way from a descriptor that is a path only to its file | - |
//! | `sys` | system calls without a safe wrapper | - |
//!
//! # What keeps a guest in the share
//!
//! 1. Names are one component ([`request::Name`]); a guest has no other way to say where something is.
//! 2. They are looked up in directories of a mount that is attached nowhere, without following links; inodes that a name leads to are
//!    believed only if they are the ones that were meant.
//! 3. The process's root is an empty directory; Landlock lets it name nothing but what lies in the share; its filter refuses path calls that
//!    do not begin at a descriptor.
//!
//! # Order
//!
//! Open the share and detach it; confine; start threads, each of which gives up what it does not need before its filter; serve. Locks
//! are held one at a time, and no system call is made under one, except to close a descriptor.

#![deny(unsafe_code)]

pub mod abi;
pub mod args;
pub mod device;
pub mod fs;
pub mod identity;
mod magic;
pub mod metrics;
pub mod owner;
pub mod pool;
pub mod queue;
pub mod reply;
pub mod request;
pub mod sandbox;
pub mod share;
pub mod state;
mod sys;
mod tree;
pub mod waiting;
mod watch;
pub mod xattrmap;
