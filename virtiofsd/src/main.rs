//! `outboard-virtiofsd`: a vhost-user server for virtio-fs.

fn main() {}
