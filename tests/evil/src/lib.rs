//! Backends that break the rules on purpose, for frontends to survive. (`server.rs` is a program apart: a file server that has been
//! taken over, for the sandbox to hold.)
//!
//! Each [`Behaviour`] is an ordinary entropy source or disk but for one thing. What it does not break it does right: a frontend
//! gets as far as the thing, and meets it.
//!
//! | file | what lives there |
//! |---|---|
//! | `behaviour` | the list: what each does, in a line |
//! | `backend` | the ordinary backend, and where it deviates |
//! | `ring` | what is done to rings, event descriptors and memory |

#![forbid(unsafe_code)]

mod backend;
mod behaviour;
mod ring;

pub use backend::serve;
pub use behaviour::{Act, Behaviour, all, named};
