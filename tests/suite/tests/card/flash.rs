//! Wear and secure erase: what the guest is offered, what it gets, and what the card was told.

use std::fs::{self, File};
use std::io::Read;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use probe::blk::{Disk, F_DISCARD, F_LIFETIME, F_SECURE_ERASE, Kind, SECTOR, Status, pattern, range};
use probe::device::Shape;
use probe::owner;
use suite::card::Card;
use suite::card::emmc::{BYTES, Emmc, Erasure, GROUP, WEAR};
use suite::{Scratch, Server, program, run};

/// Bytes that a test fills and looks at: four groups.
const SEEN: usize = 4 * GROUP;

/// Bytes of the configuration space.
const CONFIG: u32 = 72;

fn modules() -> PathBuf {
    std::env::var_os("OUTBOARD_CARD").expect("the kernel's modules, as cargo xtask test gives them").into()
}

/// A server of the card, and a driver of the server.
fn serve(card: &Card, scratch: &Scratch, words: &[&str]) -> (Server, Disk) {
    let file = card.disk.to_str().unwrap();
    let server = Server::start("outboard-blk", scratch, &[&["--format", "raw", "--blk-file", file], words].concat());
    let stream = UnixStream::connect(&server.socket).unwrap();
    let disk = Disk::open(stream, Shape::default(), 2, 64 << 10, 1).unwrap();
    (server, disk)
}

fn offered(disk: &mut Disk) -> u64 {
    disk.device.session().offered()
}

/// What the kernel says of the card.
fn attribute(card: &Card, name: &str) -> String {
    let disk = card.disk.file_name().unwrap().to_str().unwrap();
    fs::read_to_string(format!("/sys/block/{disk}/{name}")).unwrap().trim().to_owned()
}

fn erase(disk: &mut Disk, ranges: &[[u8; 16]]) -> Status {
    disk.request(Kind::SecureErase, 0, &mut ranges.concat()).unwrap()
}

fn sectors(bytes: usize) -> u32 {
    u32::try_from(bytes as u64 / SECTOR).unwrap()
}

/// Bytes that are nowhere zeroes for long.
fn filled() -> Vec<u8> {
    let mut bytes = vec![0; SEEN];
    pattern(0, 1, 1, &mut bytes);
    bytes
}

/// What the card itself holds, past the kernel's cache.
fn held(card: &Card) -> Vec<u8> {
    let mut bytes = vec![0; SEEN];
    fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
    File::open(&card.disk).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn what_a_guest_erases_securely_is_gone_and_its_neighbours_are_not() {
    let (card, scratch) = (Card::insert(&modules(), 0, Emmc::new()), Scratch::new());
    for words in [&[][..], &["--direct"], &["--engine", "threads"]] {
        let (server, mut disk) = serve(&card, &scratch, words);
        assert_ne!(offered(&mut disk) & F_SECURE_ERASE, 0, "{words:?}");
        let mut bytes = filled();
        disk.write(0, &mut bytes).unwrap();
        disk.flush().unwrap();
        let before = card.erasures().len();
        // A group, and a range that begins and ends inside of one.
        let (start, end) = (2 * GROUP + 4096, 3 * GROUP - 512);
        let status = erase(
            &mut disk,
            &[range(u64::from(sectors(GROUP)), sectors(GROUP), 0), range(u64::from(sectors(start)), sectors(end - start), 0)],
        );
        assert_eq!(status, Status::Ok, "{words:?}");
        bytes[GROUP..2 * GROUP].fill(0);
        bytes[start..end].fill(0);
        let mut seen = vec![0xff; SEEN];
        disk.read(0, &mut seen).unwrap();
        assert!(seen == bytes, "{words:?}: what the guest reads");
        assert!(held(&card) == bytes, "{words:?}: what the card holds");
        let wanted = [(GROUP, 2 * GROUP), (start, end)].map(|(start, end)| Erasure { start, end, secure: true });
        assert_eq!(card.erasures()[before..], wanted, "{words:?}: what the card was told");
        // What a discard gives back is no secret that was kept.
        assert_eq!(disk.request(Kind::Discard, 0, &mut range(0, sectors(GROUP), 0)).unwrap(), Status::Ok);
        assert!(!card.erasures().last().unwrap().secure);
        drop(disk);
        assert_eq!(server.terminate(), Some(0));
    }
}

#[test]
fn secure_erase_has_limits_and_a_guest_that_breaks_them_erases_nothing() {
    let (card, scratch) = (Card::insert(&modules(), 0, Emmc::new()), Scratch::new());
    let (_server, mut disk) = serve(&card, &scratch, &[]);
    let config = disk.device.session().config(CONFIG).unwrap();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    let (most, ranges, alignment) = (word(60), word(64), word(68));
    assert_eq!(u64::from(alignment) * SECTOR, attribute(&card, "queue/discard_granularity").parse::<u64>().unwrap());
    assert_eq!((most, ranges), (1 << 21, 16), "1 GiB each");
    let size = BYTES as u64 / SECTOR;
    let good = range(0, 8, 0);
    for (bad, status) in [
        (vec![range(0, 8, 1)], Status::Unsupported),
        (vec![good, range(8, 8, 2)], Status::Unsupported),
        (vec![range(size, 1, 0)], Status::IoError),
        (vec![good, range(size - 1, 2, 0)], Status::IoError),
        (vec![range(u64::MAX, 8, 0)], Status::IoError),
        (vec![range(0, most + 1, 0)], Status::IoError),
        (vec![good; ranges as usize + 1], Status::IoError),
    ] {
        assert_eq!(erase(&mut disk, &bad), status, "{bad:?}");
    }
    assert_eq!(disk.request(Kind::SecureErase, 0, &mut good[..15].to_vec()).unwrap(), Status::IoError, "half a range");
    assert_eq!(erase(&mut disk, &[]), Status::IoError, "no range: what was not done is not said to be done");
    assert_eq!(card.erasures(), [], "nothing was done, not even the good half of a bad request");
    assert_eq!(erase(&mut disk, &vec![good; ranges as usize]), Status::Ok);
    assert_eq!(erase(&mut disk, &[range(size, 0, 0)]), Status::Ok, "nothing, at the end");
    assert_eq!(card.erasures().len(), ranges as usize);
}

#[test]
fn a_card_that_erases_groups_only_says_so_of_everything_else() {
    let (card, scratch) = (Card::insert(&modules(), 0, Emmc::coarse()), Scratch::new());
    let (_server, mut disk) = serve(&card, &scratch, &[]);
    let mut bytes = filled();
    disk.write(0, &mut bytes).unwrap();
    disk.flush().unwrap();
    assert_eq!(erase(&mut disk, &[range(8, 8, 0)]), Status::IoError);
    assert!(held(&card) == bytes, "a refused range is left as it is");
    assert_eq!(erase(&mut disk, &[range(0, sectors(GROUP), 0)]), Status::Ok);
    assert_eq!(card.erasures(), [Erasure { start: 0, end: GROUP, secure: true }]);
}

#[test]
fn a_disk_that_is_not_the_device_itself_erases_nothing_securely() {
    let (card, scratch) = (Card::insert(&modules(), 0, Emmc::new()), Scratch::new());
    let file = card.disk.to_str().unwrap().to_owned();
    for words in [&["--read-only"][..], &["--ephemeral"]] {
        let (server, mut disk) = serve(&card, &scratch, words);
        assert_eq!(offered(&mut disk) & F_SECURE_ERASE, 0, "{words:?}");
        assert_eq!(erase(&mut disk, &[range(0, 8, 0)]), Status::Unsupported, "{words:?}");
        drop(disk);
        assert_eq!(server.terminate(), Some(0));
    }
    let overlay = scratch.path("top.qcow2");
    let size = format!("{}M", BYTES >> 20);
    let words = ["image", "create", "--size", &size, "--format", "qcow2", "--backing", &file, "--backing-format", "raw"];
    let made = run(Command::new(program("outboard")).args(words).arg(&overlay));
    assert_eq!(made.code, Some(0), "{}", made.err);
    // An overlay that comes while it runs: the feature was offered, and what is below is kept as it is.
    let control = scratch.path("control");
    let (_server, mut disk) = serve(&card, &scratch, &["--control-path", control.to_str().unwrap()]);
    assert_eq!(erase(&mut disk, &[range(0, 8, 0)]), Status::Ok);
    let top = File::options().read(true).write(true).open(&overlay).unwrap();
    let mut answers = owner::say(&control, r#"{"command":"snapshot"}"#, Some(top.as_fd())).unwrap();
    answers.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    answers.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(r#""ok":true"#), "{answer}");
    assert_eq!(erase(&mut disk, &[range(8, 8, 0)]), Status::IoError);
    assert_eq!(card.erasures().len(), 1, "only the one before the overlay came");
}

#[test]
fn the_wear_of_a_card_is_what_the_kernel_says() {
    let (card, scratch) = (Card::insert(&modules(), 0, Emmc::new()), Scratch::new());
    let (_server, mut disk) = serve(&card, &scratch, &[]);
    assert_ne!(offered(&mut disk) & F_LIFETIME, 0);
    let mut wear = [0xff; 4];
    assert_eq!(disk.request(Kind::GetLifetime, 0, &mut wear).unwrap(), Status::Ok);
    let [end, a, b] = WEAR;
    assert_eq!(wear, [end, 0, a, b]);
    let said = format!("{} {}", attribute(&card, "device/pre_eol_info"), attribute(&card, "device/life_time"));
    assert_eq!(said, format!("0x{end:02x} 0x{a:02x} 0x{b:02x}"));
}

#[test]
fn an_old_card_offers_neither() {
    let (card, scratch) = (Card::insert(&modules(), 0, Emmc::old()), Scratch::new());
    assert_eq!(attribute(&card, "device/life_time"), "0x00 0x00", "the kernel has a file all the same");
    let (_server, mut disk) = serve(&card, &scratch, &[]);
    let offered = offered(&mut disk);
    assert_eq!(offered & (F_LIFETIME | F_SECURE_ERASE), 0);
    assert_ne!(offered & F_DISCARD, 0);
    assert_eq!(erase(&mut disk, &[range(0, 8, 0)]), Status::Unsupported);
    assert_eq!(disk.request(Kind::GetLifetime, 0, &mut [0; 4]).unwrap(), Status::Unsupported);
    assert_eq!(card.erasures(), []);
}
