#!/bin/sh
# Writes blocks past the guest's cache, reads each back and compares, until /run/enough is there. 96 files of 64 KiB, and
# their sums at the end. /run/bad: what differs or fails; /run/count: how far it came; /run/stall: the longest one block
# took, in hundredths of a second of the guest's clock; /run/ended: done.
cd /home; n=0; worst=0
while [ ! -e /run/enough ]; do
  read -r before _ </proc/uptime
  f=f$((n % 96)); n=$((n + 1))
  head -c 65536 /dev/urandom >/run/block
  dd if=/run/block of=$f bs=64k oflag=direct conv=notrunc,fsync 2>>/run/said || echo "$n: not written" >>/run/bad
  dd if=$f bs=64k iflag=direct 2>>/run/said | cmp -s - /run/block || echo "$n: read back otherwise" >>/run/bad
  sha256sum </run/block >/run/$f.sum
  read -r after _ </proc/uptime
  took=$((${after%.*}${after#*.} - ${before%.*}${before#*.}))
  if [ $took -gt $worst ]; then worst=$took; echo $worst >/run/stall; fi
  echo $n >/run/count.new; mv /run/count.new /run/count
done
sync; echo 3 >/proc/sys/vm/drop_caches
for f in f*; do sha256sum <$f | cmp -s - /run/$f.sum || echo "$f: differs at the end" >>/run/bad; done
: >/run/ended
