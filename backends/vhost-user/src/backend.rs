//! placeholder
/// x
#[derive(Debug)]
pub struct Backend;
