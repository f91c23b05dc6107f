//! stub

/// The file server of the KVM test machine.
pub const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
