#!/bin/sh
# Builds one piece of the guest images. Called by `cargo xtask guest`, which caches by the hash of this folder.
#
#   build.sh kernel OUT WORK          OUT/vmlinuz, OUT/initramfs, OUT/cmdline, the same with tiny-
#   build.sh tiny OUT WORK            OUT/tiny.raw
#   build.sh debian OUT WORK          OUT/debian.raw            (root: debootstrap)
#   build.sh debian-office OUT WORK   OUT/debian-office.raw     (root; from the tree the debian step kept in WORK)
#
# Everything is written under WORK first and renamed into OUT at the end, so an interrupted build leaves no half image.
# The caller runs the root steps in a private mount and PID namespace: nothing stays mounted, whatever happens here.
set -eu
piece=$1 out=$2 work=$3
here=$(cd "$(dirname "$0")" && pwd)
suite=bookworm
mirror=${MUSTER_DEBIAN_MIRROR:-http://deb.debian.org/debian}
packages=$(sed 's/#.*//' "$here/packages-debian.txt" | tr -s ' \n' ',' | sed 's/^,//; s/,$//')
office=$(sed 's/#.*//' "$here/packages-office.txt" | tr -s ' \n' '  ')
# one fixed date for all the files an image gets from us: a rebuild of the same packages differs as little as possible
export SOURCE_DATE_EPOCH=1750000000 LC_ALL=C DEBIAN_FRONTEND=noninteractive
PATH=$PATH:/usr/sbin:/sbin
umask 022
mkdir -p "$out" "$work"
stage=$work/$piece
rm -rf "$stage"; mkdir -p "$stage"
trap 'rm -rf "$stage" 2>/dev/null || true' EXIT
case $piece in
  # dpkg syncs each file it unpacks: in memory that costs nothing (this mount is private, see above)
  debian*) mount -t tmpfs -o mode=755,size=3g stage "$stage" ;;
esac

# An apt of its own (sources, lists, cache), so that the guest's packages come from $suite whatever the host runs.
private_apt() {
  apt=$work/apt
  mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial"
  : >"$apt/status"
  keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  echo "deb [signed-by=$keyring] $mirror $suite main" >"$apt/sources.list"
  cat >"$apt/apt.conf" <<CONF
Dir::State "$apt/state"; Dir::State::status "$apt/status"; Dir::Cache "$apt/cache";
Dir::Etc::SourceList "$apt/sources.list"; Dir::Etc::SourceParts "/dev/null"; Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null"; APT::Architecture "amd64"; APT::Architectures { "amd64"; };
APT::Sandbox::User ""; Acquire::Languages "none"; APT::Install-Recommends "false";
CONF
  # apt reads APT_CONFIG last, so these win over the host's own settings
  export APT_CONFIG=$apt/apt.conf
  apt-get -q update
}

# unpack PACKAGE DIR
unpack() {
  ( cd "$stage" && apt-get -q download "$1" )
  dpkg-deb -x "$stage/$1"_*.deb "$2"
}

# pack_initramfs DIR FILE: newest kernels take any compression; lz4 is the cheapest to unpack under emulation
pack_initramfs() {
  find "$1" -exec touch -hd "@$SOURCE_DATE_EPOCH" {} +
  ( cd "$1" && find . -print0 | sort -z | cpio --quiet --reproducible --null -o -H newc -R 0:0 ) | lz4 -l -9 -q >"$2"
}

build_kernel() {
  private_apt
  image=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)$/\1/p' | head -n 1)
  [ -n "$image" ] || { echo "no kernel package behind linux-image-cloud-amd64" >&2; exit 1; }
  unpack "$image" "$stage/kernel"
  unpack busybox-static "$stage/busybox"
  cp "$stage/kernel/boot/vmlinuz-"* "$stage/vmlinuz"

  modules=$(echo "$stage/kernel/lib/modules/"*)
  for guest in initramfs tiny-initramfs; do
    root=$stage/$guest.d
    mkdir -p "$root/bin" "$root/lib/modules" "$root/dev" "$root/proc" "$root/sys" "$root/root" "$root/etc/acpi/PWRF"
    cp "$stage/busybox/bin/busybox" "$root/bin/busybox"
    : >"$root/lib/modules/order"
    while read -r module when; do
      case $module in ''|'#'*) continue ;; esac
      if [ "$guest" = tiny-initramfs ] && [ "$when" != tiny ]; then continue; fi
      file=$(find "$modules" -name "$module.ko" | head -n 1)
      [ -n "$file" ] || { echo "the kernel has no module $module" >&2; exit 1; }
      cp "$file" "$root/lib/modules/$module.ko"
      echo "$module" >>"$root/lib/modules/order"
    done <"$here/modules.txt"
    if [ "$guest" = initramfs ]; then cp "$here/init-disk" "$root/init"; else cp "$here/init-tiny" "$root/init"; fi
    chmod 755 "$root/init"
    pack_initramfs "$root" "$stage/$guest"
  done
  for file in cmdline tiny-cmdline; do cp "$here/$file" "$stage/$file"; done
  for file in vmlinuz initramfs tiny-initramfs cmdline tiny-cmdline; do mv "$stage/$file" "$out/$file"; done
}

build_tiny() {
  # block 0: the header the tiny guest looks for; block 1: its boot counter; from 1 MiB: 1 MiB of unique text
  { printf 'MUSTER-TINY 1\n'; head -c 1048562 /dev/zero; seq -w 1 131072 | head -c 1048576; } >"$stage/tiny.raw"
  truncate -s 16M "$stage/tiny.raw"
  mv "$stage/tiny.raw" "$out/tiny.raw"
}

# What an image needs neither to run nor to install more packages.
strip_tree() {
  rm -rf "$1"/var/cache/apt/*.bin "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/* "$1"/var/log/* \
    "$1"/usr/share/doc/* "$1"/usr/share/man/* "$1"/usr/share/info/* "$1"/usr/share/locale/* "$1"/usr/share/lintian/* \
    "$1"/var/cache/ldconfig/* "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/*-old "$1"/tmp/* "$1"/debootstrap
  : >"$1/etc/machine-id"
}

# make_image TREE FILE LABEL: a file system without partition table, made without loop device or mount
make_image() {
  find "$1" -xdev -newermt "@$SOURCE_DATE_EPOCH" -exec touch -hd "@$SOURCE_DATE_EPOCH" {} +
  # the UUID and the hash seed are fixed: two builds of the same tree differ in next to no block
  E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mke2fs -q -F -t ext4 -b 4096 -m 0 -L "$3" \
    -U 6d757374-6572-4000-8000-000000000001 -O '^metadata_csum,^64bit' \
    -E lazy_itable_init=0,discard,hash_seed=6d757374-6572-4000-8000-000000000002 -d "$1" "$2" 512M
}

# deliver FILE: from memory to the disk, whole or not at all
deliver() {
  cp --sparse=always "$stage/$1" "$out/$1.new"
  mv "$out/$1.new" "$out/$1"
}

build_debian() {
  # debootstrap refuses to be root in an unmapped place, but needs no loop device and no network but the mirror
  mkdir -p "$work/debs"
  debootstrap --variant=minbase --cache-dir="$work/debs" --include="$packages" "$suite" "$stage/tree" "$mirror" >"$work/debootstrap.log" 2>&1 ||
    { tail -n 20 "$work/debootstrap.log" >&2; tail -n 20 "$stage/tree/debootstrap/debootstrap.log" >&2 || true; exit 1; }
  tree=$stage/tree
  for link in init:busybox poweroff:busybox reboot:busybox halt:busybox; do ln -sf "/bin/${link#*:}" "$tree/usr/sbin/${link%%:*}"; done
  rm -f "$tree/usr/sbin/shutdown"
  cp -R "$here/rootfs/." "$tree/"
  chmod 755 "$tree"/usr/lib/muster/* "$tree/usr/sbin/shutdown"
  echo desktop >"$tree/etc/hostname"
  printf '127.0.0.1 localhost desktop\n' >"$tree/etc/hosts"
  printf 'deb %s %s main\n' http://deb.debian.org/debian "$suite" >"$tree/etc/apt/sources.list"
  ln -sf /proc/mounts "$tree/etc/mtab"
  chroot "$tree" useradd --uid 1000 --no-create-home --home-dir /home/desktop --shell /bin/bash desktop
  chroot "$tree" passwd -q -d root
  chroot "$tree" passwd -q -d desktop
  strip_tree "$tree"
  make_image "$tree" "$stage/debian.raw" muster
  tar -C "$tree" -cf "$work/tree.tar.new" .
  mv "$work/tree.tar.new" "$work/tree.tar"
  deliver debian.raw
}

build_debian_office() {
  [ -e "$work/tree.tar" ] || { echo "no tree from the debian step: run it first" >&2; exit 1; }
  tree=$stage/tree
  mkdir "$tree"
  tar -C "$tree" -xf "$work/tree.tar"
  mount -t proc proc "$tree/proc"
  cp -L /etc/resolv.conf "$tree/etc/resolv.conf" 2>/dev/null || true
  cp "$tree/etc/apt/sources.list" "$stage/sources.list"
  printf 'deb %s %s main\n' "$mirror" "$suite" >"$tree/etc/apt/sources.list"
  # a service a package brings must not start in the build
  printf '#!/bin/sh\nexit 101\n' >"$tree/usr/sbin/policy-rc.d"; chmod 755 "$tree/usr/sbin/policy-rc.d"
  mkdir -p "$work/debs"
  mount --bind "$work/debs" "$tree/var/cache/apt/archives"
  mkdir -p "$work/debs/partial"
  env -u APT_CONFIG chroot "$tree" apt-get -q -o APT::Sandbox::User= update
  # shellcheck disable=SC2086 # a list of names
  env -u APT_CONFIG chroot "$tree" apt-get -q -y -o APT::Sandbox::User= -o APT::Keep-Downloaded-Packages=true install --no-install-recommends $office
  umount "$tree/var/cache/apt/archives" "$tree/proc"
  rm -f "$tree/usr/sbin/policy-rc.d" "$tree/etc/resolv.conf"
  cp "$stage/sources.list" "$tree/etc/apt/sources.list"
  strip_tree "$tree"
  make_image "$tree" "$stage/debian-office.raw" muster
  deliver debian-office.raw
}

case $piece in
  kernel) build_kernel ;;
  tiny) build_tiny ;;
  debian) build_debian ;;
  debian-office) build_debian_office ;;
  *) echo "unknown piece: $piece" >&2; exit 2 ;;
esac
