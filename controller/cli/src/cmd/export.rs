//! Writes an image to a file: beside it first, and in its place once all of it is there and on the disk.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use muster_api::{Download, Extents};
use muster_common::ByteLen;
use rustix::{
    fs::{CWD, RenameFlags},
    io::Errno,
};
use serde::Serialize;

use super::Session;
use crate::{
    args::ExportFormat,
    output::print,
    progress::{StatusLine, bar},
};

/// What was written.
#[derive(Serialize)]
struct Exported {
    image: String,
    file: String,
    format: &'static str,
    /// The file's length.
    bytes: u64,
    /// Bytes of it that were written; the rest are holes.
    written_bytes: u64,
}

pub async fn run(session: &Session, image: &str, path: &Path, format: ExportFormat, force: bool) -> anyhow::Result<()> {
    let part = Part::create(path, force)?;
    let wanted = match format {
        ExportFormat::Raw => muster_api::ExportFormat::Extents,
        ExportFormat::Qcow2 => muster_api::ExportFormat::Qcow2,
    };
    let named = session.client.image(image).await?;
    let mut download = session.client.export_image(&named.digest.to_string(), wanted).await?;
    let full_name = format!("{}@{}", named.name, named.revision);
    let written = tokio::select! {
        written = receive(&mut download, &part, format) => written,
        _ = tokio::signal::ctrl_c() => bail!("interrupted; nothing is left of {}", path.display()),
    };
    let (bytes, written_bytes) = written.with_context(|| format!("export {full_name} to {}", path.display()))?;
    part.finish(force)?;
    let exported = Exported {
        image: full_name,
        file: path.display().to_string(),
        format: match format {
            ExportFormat::Raw => "raw",
            ExportFormat::Qcow2 => "qcow2",
        },
        bytes,
        written_bytes,
    };
    print(session.output, &exported, |e| {
        let (bytes, written) = (ByteLen(e.bytes), ByteLen(e.written_bytes));
        format!("{}: {} as {}, {bytes} long, {written} of it written\n", e.file, e.image, e.format)
    })?;
    Ok(())
}

/// The file's length, and how much of it was written.
async fn receive(download: &mut Download, part: &Part, format: ExportFormat) -> anyhow::Result<(u64, u64)> {
    let (len, total) = (download.len(), download.data_bytes().unwrap_or(0));
    let mut line = StatusLine::new();
    let mut extents = Extents::default();
    let mut written = 0;
    while let Some(bytes) = download.next().await? {
        match format {
            ExportFormat::Raw => extents.feed(&bytes, &mut |at, piece| {
                written += piece.len() as u64;
                part.file.write_all_at(piece, at)
            })?,
            ExportFormat::Qcow2 => {
                written += bytes.len() as u64;
                (&part.file).write_all(&bytes).context("write the image")?;
            }
        }
        line.show(&format!("export: {}", bar(written.min(total), total)));
    }
    let size = match format {
        ExportFormat::Raw => extents.finish()?,
        ExportFormat::Qcow2 => written,
    };
    if let (ExportFormat::Qcow2, Some(len)) = (format, len)
        && len != size
    {
        bail!("the controller's answer broke off after {} of {}", ByteLen(size), ByteLen(len));
    }
    part.file.set_len(size).context("set the file's length")?;
    part.file.sync_all().context("write the image to the disk")?;
    Ok((size, written))
}

/// The file on its way; gone when it does not get there.
struct Part {
    file: File,
    part: PathBuf,
    path: PathBuf,
    done: bool,
}

impl Part {
    fn create(path: &Path, force: bool) -> anyhow::Result<Self> {
        match fs::symlink_metadata(path) {
            Ok(there) if there.is_dir() => bail!("{} is a directory: name a file", path.display()),
            Ok(_) if !force => bail!("{} exists already (--force replaces it)", path.display()),
            Ok(there) if !there.is_file() => bail!("{} is no regular file: it is not replaced", path.display()),
            _ => {}
        }
        let Some(name) = path.file_name() else { bail!("{} is not the name of a file", path.display()) };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.part", std::process::id()));
        let part = path.with_file_name(hidden);
        let file = File::create_new(&part).with_context(|| format!("create {}", part.display()))?;
        Ok(Self { file, part, path: path.to_path_buf(), done: false })
    }

    /// Puts the file in its place, durably.
    fn finish(mut self, force: bool) -> anyhow::Result<()> {
        let place = || format!("put the image in its place, {}", self.path.display());
        if force {
            fs::rename(&self.part, &self.path).with_context(place)?;
        } else {
            match rustix::fs::renameat_with(CWD, &self.part, CWD, &self.path, RenameFlags::NOREPLACE) {
                Ok(()) => {}
                // a file system that cannot rename so: a second name, and the first one goes
                Err(Errno::INVAL | Errno::NOSYS) => {
                    fs::hard_link(&self.part, &self.path).with_context(place)?;
                    fs::remove_file(&self.part).with_context(place)?;
                }
                Err(Errno::EXIST) => bail!("{} exists by now (--force replaces it)", self.path.display()),
                Err(e) => return Err(io::Error::from(e)).with_context(place),
            }
        }
        self.done = true;
        let directory = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|d| d.sync_all()).with_context(|| format!("sync {}", directory.display()))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.done {
            // what is left of a failed export is of no use; that it stays is seen by its name
            let _ = fs::remove_file(&self.part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_there_is_replaced_only_by_force_and_a_failed_export_leaves_nothing() {
        let dir = std::env::temp_dir().join(format!("muster-export-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let path = dir.join("disk.raw");
        let names = || fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        drop(Part::create(&path, false).unwrap());
        assert!(names().is_empty());

        let part = Part::create(&path, false).unwrap();
        (&part.file).write_all(b"first").unwrap();
        assert!(!path.exists(), "not before it is whole");
        part.finish(false).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");

        let refused = Part::create(&path, false).err().unwrap();
        assert!(refused.to_string().contains("--force"), "{refused}");
        let late = Part::create(&path, true).unwrap();
        assert!(late.finish(false).unwrap_err().to_string().contains("exists by now"));
        let forced = Part::create(&path, true).unwrap();
        (&forced.file).write_all(b"second").unwrap();
        forced.finish(true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(), ["disk.raw"]);
        assert!(Part::create(&dir, true).err().unwrap().to_string().contains("is a directory"));
        assert!(Part::create(Path::new("/dev/null"), true).err().unwrap().to_string().contains("no regular file"));
        fs::remove_dir_all(&dir).unwrap();
    }
}
