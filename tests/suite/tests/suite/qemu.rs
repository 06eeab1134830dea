//! QEMU as the frontend of our device processes.
