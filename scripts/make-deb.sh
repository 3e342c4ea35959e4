#!/usr/bin/env bash
# Packs target/release/standpipe, or BINARY, as target/debian/standpipe_<version>_<architecture>.deb. It needs dpkg-dev and
# binutils, no debhelper and no root. The package fits the Debian release, or a later one, on which the binary was linked.
#
#   BINARY      the program to pack; it is run, for its manual pages and completions
#   REVISION    the package's own number after the version (1)
#   MAINTAINER  who answers for the package, as "Name <address>"
set -euo pipefail
umask 022
cd "$(dirname "$0")/.."

fail() { printf 'make-deb: %s\n' "$*" >&2; exit 1; }

binary=${BINARY:-${CARGO_TARGET_DIR:-target}/release/standpipe}
out=target/debian
maintainer=${MAINTAINER:-standpipe contributors <standpipe@packages.invalid>}
description=(
    "AT Protocol firehose into Redis and PostgreSQL"
    " Takes the AT Protocol firehose into a Redis stream and, through consumer-group"
    " pipelines working in parallel, into PostgreSQL: one transaction per event,"
    " nothing lost, nothing counted twice. It waits for outages of either server,"
    " resumes where it stopped, and exposes its health, metrics and a dashboard."
)

missing=()
for tool in dpkg-deb dpkg-shlibdeps objdump strip gzip; do
    command -v "$tool" >/dev/null || missing+=("$tool")
done
[ ${#missing[@]} -eq 0 ] || fail "missing: ${missing[*]}; as root: apt-get install dpkg-dev binutils"
[ -x "$binary" ] || fail "there is no $binary; make build makes it"

number=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"$/\1/p' Cargo.toml)
[ -n "$number" ] || fail "Cargo.toml has no version"
# 1.0.0-rc.1 comes before 1.0.0, which is what ~ means to dpkg.
version=${number/-/\~}-${REVISION:-1}
architecture=$(dpkg --print-architecture)
# The same tree gives the same package.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Where dpkg-shlibdeps looks for the files of a package.
root=$work/debian/standpipe
put() { install -D -m "$1" "$2" "$root/$3"; }
pack() { gzip -9n; }

put 755 "$binary" usr/bin/standpipe
strip --strip-unneeded --remove-section=.comment "$root/usr/bin/standpipe"

# What the program knows of itself. One from before `man` and `completions` says 64, for a bad command line.
program=$root/usr/bin/standpipe
knows() {
    local code=0
    env -i "$program" "$1" --help >/dev/null 2>&1 || code=$?
    case $code in
        0) return 0 ;;
        64) printf 'make-deb: WARNING: this binary does not know `standpipe %s`; the package goes without\n' "$1" >&2; return 1 ;;
        *) fail "$binary $1 --help ended with $code" ;;
    esac
}
if knows man; then
    env -i "$program" man "$work/man"
    for page in "$work/man"/*.1; do
        name=${page##*/}
        install -d "$root/usr/share/man/man1"
        pack <"$page" >"$root/usr/share/man/man1/$name.gz"
    done
fi
if knows completions; then
    for shell in bash zsh fish; do env -i "$program" completions "$shell" >"$work/$shell"; done
    put 644 "$work/bash" usr/share/bash-completion/completions/standpipe
    put 644 "$work/zsh" usr/share/zsh/vendor-completions/_standpipe
    put 644 "$work/fish" usr/share/fish/vendor_completions.d/standpipe.fish
fi

for unit in packaging/systemd/*.service; do
    put 644 "$unit" "usr/lib/systemd/system/${unit##*/}"
done
put 640 config.example.env etc/standpipe/standpipe.env

docs=usr/share/doc/standpipe
for page in README.md docs/*.md; do
    put 644 "$page" "$docs/${page##*/}"
done
# They stand in one folder here.
sed -i 's|(docs/|(|g' "$root/$docs/README.md"
# Pictures would be most of the package.
sed -i '/^!\[.*\](images\/.*)$/d' "$root/$docs"/*.md
while IFS= read -r file; do
    put 644 "$file" "$docs/examples/$file"
done < <(find monitoring -type f | LC_ALL=C sort)
put 644 packaging/debian/lintian-overrides usr/share/lintian/overrides/standpipe
put 644 packaging/debian/copyright "$docs/copyright"
pack <CHANGELOG.md >"$root/$docs/changelog.gz"
pack >"$root/$docs/changelog.Debian.gz" <<CHANGELOG
standpipe ($version) unstable; urgency=medium

  * Version $number; what changed is in changelog.gz.

 -- $maintainer  $(LC_ALL=C date --utc --date="@$SOURCE_DATE_EPOCH" '+%a, %d %b %Y %H:%M:%S +0000')
CHANGELOG

# The least libraries that have all the symbols which it uses. dpkg-shlibdeps wants to see a source package.
printf 'Source: standpipe\n\nPackage: standpipe\nArchitecture: any\n' >"$work/debian/control"
mkdir "$root/DEBIAN"
depends=$(cd "$work" && dpkg-shlibdeps -O "$root/usr/bin/standpipe" | sed -n 's/^shlibs:Depends=//p')
[ -n "$depends" ] || fail "dpkg-shlibdeps found no libraries"

for script in postinst prerm postrm; do
    put 755 "packaging/debian/$script" "DEBIAN/$script"
done
printf '/etc/standpipe/standpipe.env\n' >"$root/DEBIAN/conffiles"
(cd "$root" && find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
{
    printf 'Package: standpipe\nVersion: %s\nArchitecture: %s\n' "$version" "$architecture"
    printf 'Maintainer: %s\n' "$maintainer"
    printf 'Installed-Size: %s\n' "$(du -k -s --apparent-size --exclude=DEBIAN "$root" | cut -f 1)"
    printf 'Depends: adduser, %s\n' "$depends"
    # The authorities that TLS to PostgreSQL trusts.
    printf 'Recommends: ca-certificates\nSuggests: postgresql, redis-server\n'
    printf 'Section: net\nPriority: optional\nDescription: '
    printf '%s\n' "${description[@]}"
} >"$root/DEBIAN/control"

mkdir -p "$out"
file=$out/standpipe_${version}_$architecture.deb
dpkg-deb --root-owner-group -Zxz --build "$root" "$file" >/dev/null
printf '%s\n' "$file"
