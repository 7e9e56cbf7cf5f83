// Command image writes Bauta's container image as an OCI archive, without a container engine. The
// same commit gives the same bytes, wherever and whenever it is built.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"bauta.dev/bauta/internal/advice"
)

// request is what the command line asks for.
type request struct {
	out     string
	variant string
	archs   []string
	version string // "": what git describe says
	ref     string // "": repository, version and variant
	root    string // the module's folder
}

const (
	ebpf     = "ebpf"
	iptables = "iptables"
	// repository is the image's name before the tag, unless -ref gives another.
	repository = "bauta.dev/bauta"
)

// references are those that containerd, skopeo and Kubernetes all take: host, path, tag.
var references = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)

var errUsage = errors.New("usage")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run returns the exit code: 0 done, 1 failed, 2 wrong usage.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	err := command(ctx, args, stdout, stderr)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		fmt.Fprintf(stderr, "error: %v\n", strings.TrimPrefix(err.Error(), errUsage.Error()+": "))
		fmt.Fprintln(stderr, "hint: see go run ./packaging/image -help")
		return 2
	}
	fmt.Fprintf(stderr, "error: %v\n", err)
	for _, hint := range advice.Of(err) {
		fmt.Fprintf(stderr, "hint: %s\n", hint)
	}
	return 1
}

func usagef(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errUsage, fmt.Errorf(format, args...))
}

func command(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var r request
	var arch, check, unpack string
	var update bool
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&r.out, "o", "", "write the archive to `FILE`, and its SBOM to FILE.spdx.json")
	flags.StringVar(&r.variant, "variant", ebpf, "ebpf, or iptables: with the tools of iptables mode")
	flags.StringVar(&arch, "arch", "amd64", "amd64, arm64, or both with a comma between")
	flags.StringVar(&r.version, "version", "", "version of the image and the binary (default: git describe)")
	flags.StringVar(&r.ref, "ref", "", "`NAME:TAG` that containerd gives the image (default "+repository+":VERSION, with -iptables for that variant)")
	flags.StringVar(&r.root, "root", ".", "`FOLDER` of the module")
	flags.StringVar(&check, "check", "", "check every digest and file of the archive `FILE`, and say what is in it")
	flags.StringVar(&unpack, "unpack", "", "with -check: write the image's files to the new `FOLDER`")
	flags.BoolVar(&update, "update-packages", false, "write the newest versions of Debian's packages to "+lockFile)
	given := map[string]bool{}
	err := flags.Parse(args)
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintln(stdout, "usage: go run ./packaging/image -o FILE [flags]\n       go run ./packaging/image -check FILE [-unpack FOLDER]\n       go run ./packaging/image -update-packages")
		flags.SetOutput(stdout)
		flags.PrintDefaults()
		return err
	case err != nil:
		return usagef("%w", err)
	case flags.NArg() > 0:
		return usagef("argument %q is not a flag", flags.Arg(0))
	case update && len(given) > 1:
		return usagef("-update-packages goes with no other flag")
	case update:
		return updateLock(ctx, r.root, time.Now())
	case unpack != "" && check == "":
		return usagef("-unpack needs -check FILE")
	case check != "" && (len(given) > 2 || len(given) == 2 && unpack == ""):
		return usagef("-check goes with -unpack only")
	case check != "":
		return checkArchive(check, unpack, stdout)
	}
	r.archs = strings.Split(arch, ",")
	if err := r.validate(); err != nil {
		return err
	}
	if err := r.write(ctx, stderr); err != nil {
		return err
	}
	return checkArchive(r.out, "", stdout)
}

func checkArchive(file, unpack string, stdout io.Writer) error {
	a, err := readArchive(file)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if unpack != "" {
		if err := a.unpack(unpack); err != nil {
			return err
		}
	}
	return a.describe(stdout)
}

func (r *request) validate() error {
	switch {
	case r.out == "":
		return usagef("-o FILE is missing")
	case r.variant != ebpf && r.variant != iptables:
		return usagef("-variant %q: ebpf or iptables", r.variant)
	}
	for i, a := range r.archs {
		if _, ok := machines[a]; !ok {
			return usagef("-arch %q: amd64 or arm64", a)
		}
		if slices.Contains(r.archs[:i], a) {
			return usagef("-arch: %s twice", a)
		}
	}
	if r.ref != "" && !references.MatchString(r.ref) {
		return usagef("-ref %q: wants HOST/NAME:TAG, such as registry.example/bauta:v1", r.ref)
	}
	return nil
}

// reference is the image's name and tag. A version may have characters that a tag can't.
func (r *request) reference(version string) (string, error) {
	if r.ref != "" {
		return r.ref, nil
	}
	ref := repository + ":" + version
	if r.variant != ebpf {
		ref += "-" + r.variant
	}
	if !references.MatchString(ref) {
		return "", usagef("version %q can't be a tag: give -ref NAME:TAG", version)
	}
	return ref, nil
}
