//! Builds the guest images of `xtask/guest` into `target/guest`, each piece only when its recipe changed.

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::run::{Context, is_root};

/// What can be built by itself. The order is the order of building.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    Kernel,
    Tiny,
    Debian,
    Office,
}

impl Piece {
    pub const ALL: [Piece; 4] = [Piece::Kernel, Piece::Tiny, Piece::Debian, Piece::Office];

    fn name(self) -> &'static str {
        match self {
            Piece::Kernel => "kernel",
            Piece::Tiny => "tiny",
            Piece::Debian => "debian",
            Piece::Office => "debian-office",
        }
    }

    pub fn parse(name: &str) -> Result<Piece> {
        let found = Piece::ALL.into_iter().find(|piece| piece.name() == name);
        found.with_context(|| format!("no guest piece {name}: there are kernel, tiny, debian, debian-office"))
    }

    fn files(self) -> &'static [&'static str] {
        match self {
            Piece::Kernel => &["vmlinuz", "initramfs", "cmdline", "tiny-initramfs", "tiny-cmdline"],
            Piece::Tiny => &["tiny.raw"],
            Piece::Debian => &["debian.raw"],
            Piece::Office => &["debian-office.raw"],
        }
    }

    fn needs_root(self) -> bool {
        matches!(self, Piece::Debian | Piece::Office)
    }
}

/// Where the images are.
pub fn dir(context: &Context) -> PathBuf {
    context.target.join("guest")
}

/// True when this piece is there and its recipe has not changed since.
pub fn is_current(context: &Context, piece: Piece) -> Result<bool> {
    let dir = dir(context);
    let key = key(&context.root.join("xtask/guest"), piece)?;
    let stamp = std::fs::read_to_string(dir.join(format!(".{}.key", piece.name()))).unwrap_or_default();
    Ok(stamp == key && piece.files().iter().all(|file| dir.join(file).exists()))
}

/// Builds what is missing or out of date.
pub fn build(context: &Context, pieces: &[Piece]) -> Result<()> {
    let dir = dir(context);
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    // two builds at once would write the same files
    let lock = File::create(dir.join(".lock"))?;
    lock.lock().context("lock the guest images")?;
    for &piece in pieces {
        context.step(&format!("guest image {}", piece.name()), || {
            if is_current(context, piece)? {
                return Ok("present".to_owned());
            }
            let base_is_current =
                || Ok::<_, anyhow::Error>(is_current(context, Piece::Debian)? && dir.join("work/tree.tar").exists());
            if piece == Piece::Office && !base_is_current()? {
                build_piece(context, &dir, Piece::Debian)?;
            }
            build_piece(context, &dir, piece)?;
            Ok("built".to_owned())
        })?;
    }
    Ok(())
}

fn build_piece(context: &Context, dir: &Path, piece: Piece) -> Result<()> {
    let script = context.root.join("xtask/guest/build.sh");
    if piece.needs_root() && !is_root() {
        bail!("debootstrap needs root. Run: sudo cargo xtask guest {}", piece.name());
    }
    let stamp = dir.join(format!(".{}.key", piece.name()));
    std::fs::remove_file(&stamp).ok();
    let command = if piece.needs_root() {
        // its own mounts and processes: nothing is left behind, even by an interrupted debootstrap. In a chroot whose
        // root is no mount point the propagation cannot be changed, and need not be.
        let private = ["--mount", "--pid", "--fork", "--kill-child", "--propagation", "slave"];
        let plain = ["--mount", "--pid", "--fork", "--kill-child", "--propagation", "unchanged"];
        let flags = if context.command("unshare").args(private).arg("true").succeeds() { private } else { plain };
        context.command("unshare").args(flags).arg("sh").arg(&script)
    } else {
        context.command("sh").arg(&script)
    };
    let command = command.arg(piece.name()).arg(dir).arg(dir.join("work"));
    let command = match mirror() {
        Some(mirror) => command.env("MUSTER_DEBIAN_MIRROR", mirror),
        None => command,
    };
    command
        .run()
        .with_context(|| format!("build the guest image {} (is the package mirror reachable?)", piece.name()))?;
    std::fs::write(&stamp, key(&context.root.join("xtask/guest"), piece)?)
        .with_context(|| format!("write {}", stamp.display()))
}

/// Changes when any file of the recipe changes. Documentation is not part of it.
fn key(recipe: &Path, piece: Piece) -> Result<String> {
    let mut files = Vec::new();
    collect(recipe, &mut files)?;
    files.sort();
    let mut hasher = DefaultHasher::new();
    hasher.write(piece.name().as_bytes());
    for file in files.iter().filter(|file| file.extension().is_none_or(|extension| extension != "md")) {
        let name = file.strip_prefix(recipe)?.to_string_lossy().into_owned();
        if !concerns(&name, piece) {
            continue;
        }
        let bytes = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
        hasher.write(name.as_bytes());
        hasher.write_usize(bytes.len());
        hasher.write(&bytes);
    }
    Ok(format!("{:016x}", hasher.finish()))
}

/// Which files of the recipe a piece is made of: a new desktop banner must not rebuild the kernel.
fn concerns(name: &str, piece: Piece) -> bool {
    let kernel = ["modules.txt", "init-disk", "init-tiny", "cmdline", "tiny-cmdline"].contains(&name);
    match piece {
        Piece::Kernel => kernel || name == "build.sh",
        Piece::Tiny => name == "build.sh",
        Piece::Debian => !kernel && name != "packages-office.txt",
        Piece::Office => !kernel,
    }
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// The Debian mirror this machine uses, when it uses one.
fn mirror() -> Option<String> {
    if let Ok(mirror) = std::env::var("MUSTER_DEBIAN_MIRROR") {
        return Some(mirror);
    }
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    files.iter().filter_map(|file| std::fs::read_to_string(file).ok()).find_map(|text| mirror_in(&text))
}

/// The first address in an apt source file that ends in `/debian`: Debian's main archive by convention.
fn mirror_in(text: &str) -> Option<String> {
    text.lines()
        .map(str::trim)
        .filter(|line| line.starts_with("URIs:") || line.starts_with("deb "))
        .flat_map(str::split_whitespace)
        .map(|word| word.trim_end_matches('/'))
        .find(|word| word.starts_with("http") && word.ends_with("/debian"))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_read_from_both_source_formats() {
        let deb822 = "Types: deb\n# comment http://old/debian\nURIs: http://mirror.test/debian/\nSuites: bookworm\n";
        assert_eq!(mirror_in(deb822).as_deref(), Some("http://mirror.test/debian"));
        let one_line =
            "deb [signed-by=/k.gpg] https://apt.test/tools stable main\ndeb http://mirror.test/debian bookworm main\n";
        assert_eq!(mirror_in(one_line).as_deref(), Some("http://mirror.test/debian"));
        assert_eq!(mirror_in("deb http://archive.test/ubuntu noble main\n"), None);
    }

    #[test]
    fn a_recipe_change_rebuilds_only_what_it_concerns() {
        assert!(!concerns("rootfs/etc/inittab", Piece::Kernel));
        assert!(concerns("rootfs/etc/inittab", Piece::Debian) && concerns("rootfs/etc/inittab", Piece::Office));
        assert!(!concerns("packages-office.txt", Piece::Debian) && concerns("packages-office.txt", Piece::Office));
        assert!(!concerns("modules.txt", Piece::Debian) && concerns("modules.txt", Piece::Kernel));
    }
}
