// Package cluster_test installs Bauta on a real Kubernetes, as its users do, and
// looks at what pods, nodes and the outside see.
package cluster_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"bauta.dev/bauta/test/cluster"
)

// The cluster that the tests share, and what it was made of.
var (
	shared   *cluster.Cluster
	programs cluster.Programs
	// untouched is what the nodes were like before Bauta came.
	untouched [][]string
)

var (
	cni   = flag.String("cni", "ptp", "how pods are connected: ptp or bridge")
	proxy = flag.String("proxy", "iptables", "mode of kube-proxy: iptables or nftables")
)

func TestMain(m *testing.M) {
	cluster.Become()
	flag.Parse()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// run runs the tests in a cluster that is gone afterwards, also after an interrupt.
func run(m *testing.M) (code int, err error) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			return 1, errors.New("not root: a cluster needs it (not skipped, since CI is set)")
		}
		fmt.Fprintln(os.Stderr, "skipped: a cluster needs root")
		return 0, nil
	}
	ctx, done := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer done()
	before, err := cluster.Look()
	if err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp("", "bauta-cluster-programs-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	begin := time.Now()
	if programs, err = cluster.Build(ctx, dir); err != nil {
		return 1, err
	}
	for _, image := range []struct {
		version  string
		iptables bool
	}{{version, false}, {version, true}, {newer, false}} {
		archive, err := cluster.BautaImage(ctx, dir, image.version, image.iptables)
		if err != nil {
			return 1, err
		}
		programs.Images = append(programs.Images, archive)
	}
	built := time.Now()
	shared, err = cluster.Start(ctx, cluster.Options{
		Kube: programs.Kube, Helm: programs.Helm, Images: programs.Images, CNI: cluster.CNI(*cni), Proxy: cluster.Proxy(*proxy),
	})
	if err != nil {
		return 1, err
	}
	ready := time.Now()
	err = startPods(ctx)
	for _, n := range shared.Nodes() {
		var list []string
		if err == nil {
			list, err = traces(ctx, n)
		}
		untouched = append(untouched, list)
	}
	if err == nil {
		err = tryInstall(ctx, version)
	}
	if err != nil {
		return 1, errors.Join(err, errors.New(shared.Logs()), shared.Close(true), before.Unchanged())
	}
	fmt.Printf("programs built in %.1f s, nodes ready %.1f s later, pods and Bauta %.1f s later\n",
		built.Sub(begin).Seconds(), ready.Sub(built).Seconds(), time.Since(ready).Seconds())

	ended := make(chan int, 1)
	go func() { ended <- m.Run() }()
	select {
	case code = <-ended:
	case <-ctx.Done():
		return 1, errors.Join(errors.New("interrupted"), shared.Close(false), before.Unchanged())
	}
	if code != 0 {
		fmt.Fprintln(os.Stderr, shared.Logs())
	}
	return code, errors.Join(err, shared.Close(code != 0), before.Unchanged())
}
