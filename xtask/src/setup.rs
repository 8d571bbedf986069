//! Installs what the build, the tests and the demo need. A second run finds everything and changes nothing.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::run::{Context, cache_dir, is_root};

/// Debian packages and what each is for.
const PACKAGES: &[(&str, &str)] = &[
    // build
    ("gcc", "build: crates that compile C"),
    ("libc6-dev", "build: crates that compile C; test: a static program for a guest"),
    ("pkg-config", "build: finds libvirt"),
    ("libvirt-dev", "build: the agent's hypervisor driver"),
    // agent, and tests with real guests
    ("libvirt-daemon-driver-qemu", "run: libvirt's QEMU driver inside the agent"),
    ("libvirt-daemon-system", "run: the user libvirt-qemu"),
    ("qemu-system-x86", "run: virtual machines"),
    ("qemu-utils", "test: qemu-img, qemu-io, qemu-nbd"),
    // guest images
    ("debootstrap", "guest: Debian's base system"),
    ("debian-archive-keyring", "guest: checks what debootstrap fetches"),
    ("e2fsprogs", "guest: mke2fs; test: a file system that survives kills"),
    ("cpio", "guest: initramfs"),
    ("lz4", "guest: initramfs"),
    // tests against other implementations
    ("libnbd-bin", "test: nbdinfo, nbdcopy, nbdfuse"),
    ("fuse3", "test: a disk as a file, by nbdfuse"),
    ("nbdkit", "test: an NBD server to compare with"),
    ("fio", "test: verified load over NBD"),
    ("g++", "test: libFuzzer is C++"),
    ("cyclonedds-tools", "test: idlc compiles our topics, ddsperf"),
    ("cyclonedds-dev", "test: the C library that idlc's output needs"),
    ("python3-venv", "test: Cyclone DDS for Python"),
    // demo
    ("iproute2", "demo: network namespaces, bridge"),
    ("nftables", "demo: firewall between the hosts"),
    ("procps", "demo: processes"),
    ("util-linux", "demo, test: mount namespaces"),
];

/// The Python module that reads and writes our topics with another vendor's DDS.
const PYTHON_MODULE: &str = "cyclonedds";
const PYTHON_VERSION: &str = "11.0.1";

/// Newer releases may want a newer compiler than `rust-version` in Cargo.toml.
const CARGO_DENY: &str = "0.20.2";

pub fn all(context: &Context) -> Result<()> {
    context.step("Debian packages", || packages(context))?;
    context.step("Cyclone DDS for Python", || python(context))?;
    context.step("cargo-deny", || deny(context).map(|(_, said)| said))?;
    Ok(())
}

/// What the demo needs: no test tools.
pub fn for_demo(context: &Context) -> Result<()> {
    context.step("Debian packages", || packages(context))?;
    context.step("Cyclone DDS for Python", || python(context))
}

/// What the fuzzers need: packages only.
pub fn for_fuzzing(context: &Context) -> Result<()> {
    context.step("Debian packages", || packages(context))
}

/// Installs missing Debian packages, or says which command would.
pub fn packages(context: &Context) -> Result<String> {
    let names: Vec<&str> = PACKAGES.iter().map(|(name, _)| *name).collect();
    let asked = context
        .command("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status} ${Version}\n"])
        .args(&names)
        .outcome()
        .context("this machine has no dpkg: install the equivalents of the packages named in xtask/src/setup.rs")?;
    let missing = missing_packages(&names, &asked.stdout);
    if missing.is_empty() {
        return Ok("all present".to_owned());
    }
    let mut install = vec!["install".to_owned(), "-y".to_owned(), "--no-install-recommends".to_owned()];
    let root = is_root();
    if root {
        // a first install on a machine without package lists needs them; an offline machine may still have all in cache
        context.command("apt-get").args(["-q", "-o", "DPkg::Lock::Timeout=300", "update"]).outcome()?;
    }
    install.extend(downgrade(context, &missing, &asked.stdout)?);
    install.extend(missing.iter().map(|name| (*name).to_owned()));
    if !root {
        let shown: Vec<String> =
            install.iter().map(|word| if word.contains('*') { format!("'{word}'") } else { word.clone() }).collect();
        bail!(
            "packages are missing and only root can install them. Run:\n  sudo apt-get update && sudo apt-get {}",
            shown.join(" ")
        );
    }
    context
        .command("apt-get")
        .args(["-q", "-o", "DPkg::Lock::Timeout=300"])
        .args(&install)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .run()
        .context("install Debian packages (is the package mirror reachable? `apt-get update` tells)")?;
    Ok(format!("installed {}", missing.join(" ")))
}

/// Names of `wanted` that dpkg does not report as installed.
fn missing_packages<'a>(wanted: &[&'a str], report: &str) -> Vec<&'a str> {
    let installed = |name: &str| {
        report.lines().any(|line| {
            let mut words = line.split(' ');
            words.next() == Some(name) && words.next() == Some("installed")
        })
    };
    wanted.iter().copied().filter(|name| !installed(name)).collect()
}

/// qemu-utils from backports breaks the release's qemu-system-common: when one is here and the other is to come, take
/// qemu-utils from the same release.
fn downgrade(context: &Context, missing: &[&str], report: &str) -> Result<Vec<String>> {
    if !missing.contains(&"qemu-system-x86") || missing.contains(&"qemu-utils") {
        return Ok(Vec::new());
    }
    let policy = context.command("apt-cache").args(["policy", "qemu-system-x86"]).read()?;
    let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    let installed = report.lines().find_map(|line| line.strip_prefix("qemu-utils installed "));
    Ok(match (candidate.and_then(release), installed.and_then(release)) {
        (Some(candidate), Some(installed)) if candidate != installed => {
            vec!["--allow-downgrades".to_owned(), format!("qemu-utils={candidate}*")]
        }
        _ => Vec::new(),
    })
}

/// `1:7.2` of `1:7.2+dfsg-7+deb12u18`.
fn release(version: &str) -> Option<&str> {
    let end = version
        .char_indices()
        .find(|(_, c)| !(c.is_ascii_digit() || ".:".contains(*c)))
        .map_or(version.len(), |(at, _)| at);
    let upstream = &version[..end];
    // major.minor only: 10.0.2 and 10.0.3 are the same release
    let dots: Vec<usize> = upstream.match_indices('.').map(|(at, _)| at).collect();
    let end = dots.get(1).copied().unwrap_or(end);
    (end > 0).then(|| &version[..end])
}

/// The Python that has Cyclone DDS.
pub fn python_path(context: &Context) -> PathBuf {
    context.target.join("venv/bin/python")
}

fn python(context: &Context) -> Result<String> {
    let venv = context.target.join("venv");
    let check = format!(
        "import cyclonedds, importlib.metadata as m; assert m.version('{PYTHON_MODULE}') == '{PYTHON_VERSION}'"
    );
    if context.command(python_path(context)).args(["-c", &check]).succeeds() {
        return Ok("present".to_owned());
    }
    if venv.exists() {
        std::fs::remove_dir_all(&venv).with_context(|| format!("remove {}", venv.display()))?;
    }
    let python = ["/usr/bin/python3", "python3"]
        .into_iter()
        .find(|name| context.command(name).args(["-c", "import venv, ensurepip"]).succeeds())
        .context("no python3 with venv and ensurepip: install python3-venv")?;
    context.command(python).args(["-m", "venv"]).arg(&venv).run()?;
    context
        .command(python_path(context))
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"])
        .arg(format!("{PYTHON_MODULE}=={PYTHON_VERSION}"))
        .run()
        .context("install Cyclone DDS for Python (is the package index reachable?)")?;
    Ok("installed".to_owned())
}

/// Finds cargo-deny, or compiles it once into the user's cache.
pub fn deny(context: &Context) -> Result<(PathBuf, String)> {
    if context.command("cargo-deny").arg("--version").succeeds() {
        return Ok((PathBuf::from("cargo-deny"), "present".to_owned()));
    }
    let root = cache_dir().join(format!("cargo-deny-{CARGO_DENY}"));
    let binary = root.join("bin/cargo-deny");
    if context.command(&binary).arg("--version").succeeds() {
        return Ok((binary, "present".to_owned()));
    }
    // a debug build compiles in a minute on two cores and checks our tree in two seconds
    context
        .cargo()
        .args(["install", "--locked", "--quiet", "--profile", "dev", "cargo-deny", "--version", CARGO_DENY, "--root"])
        .arg(&root)
        .env("CARGO_TARGET_DIR", context.target.join("tools"))
        .env("CARGO_PROFILE_DEV_DEBUG", "false")
        .dir(Path::new("/"))
        .run()
        .context("compile cargo-deny (is the crate registry reachable?)")?;
    std::fs::remove_dir_all(context.target.join("tools")).ok();
    Ok((binary.clone(), format!("compiled into {}", binary.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_package_counts_as_missing() {
        let report = "gcc installed 4:12.2.0-3\nfio config-files 3.33-3\n";
        assert_eq!(missing_packages(&["gcc", "fio", "lz4"], report), ["fio", "lz4"]);
    }

    #[test]
    fn the_release_of_a_version_is_epoch_major_minor() {
        assert_eq!(release("1:7.2+dfsg-7+deb12u18+b3"), Some("1:7.2"));
        assert_eq!(release("1:10.0.2+ds-2+deb13u1~bpo12+1"), Some("1:10.0"));
        assert_eq!(release("(none)"), None);
    }
}
