package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"bauta.dev/bauta/internal/lab"
)

// The list before and after the edit.
var (
	listBefore = []string{"10.0.0.0/8", "198.51.100.0/24", "2001:db8:99::/64"}
	listAfter  = []string{"10.0.0.0/8", "2001:db8:99::/64"}
)

// prove runs the acts of the demo; an error says which expectation failed.
func (d *demo) prove(ctx context.Context) error {
	if err := d.writeList(listBefore...); err != nil {
		return err
	}
	if err := d.serve(); err != nil {
		return err
	}
	if err := d.startAgent(); err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	err := eventually(ctx, time.Minute, func() error {
		_, err := d.bauta(ctx, "status", "--brief")
		return err
	})
	if err != nil {
		return fmt.Errorf("agent is not ready: %w", err)
	}
	if _, err := d.show(ctx, 1, "status"); err != nil {
		return err
	}

	d.printf("What the server saw as the source:\n")
	for _, dst := range d.top.WorldAddr.All() {
		if err := d.expect(ctx, dst, d.top.NodeAddr.Of(dst)); err != nil {
			return err
		}
	}
	for _, dst := range d.top.Excluded.All() {
		if err := d.expect(ctx, dst, d.top.PodAddrs[0].Of(dst)); err != nil {
			return err
		}
	}
	d.printf("\n")
	if err := d.expectList(ctx, listBefore); err != nil {
		return err
	}

	d.printf("Now 198.51.100.0/24 is removed from the file while the agent runs.\n\n")
	start := time.Now()
	if err := d.writeList(listAfter...); err != nil {
		return err
	}
	err = eventually(ctx, 5*time.Second, func() error {
		out, err := d.bauta(ctx, "bpf", "ipmasq", "list")
		if err == nil && strings.Contains(out, "198.51.100.0/24") {
			err = fmt.Errorf("198.51.100.0/24 is still in the kernel")
		}
		return err
	})
	if err != nil {
		return err
	}
	d.printf("In the kernel after %d ms:\n\n", time.Since(start).Milliseconds())
	if err := d.expectList(ctx, listAfter); err != nil {
		return err
	}
	d.printf("New connections to the same server address are masqueraded:\n")
	if err := d.expect(ctx, d.top.Excluded.V4, d.top.NodeAddr.V4); err != nil {
		return err
	}
	d.printf("\n")
	_, err = d.show(ctx, 6, "bpf", "nat", "list")
	return err
}

// serve starts an echo server for TCP and UDP on each address of the server.
func (d *demo) serve() error {
	addrs := append(d.top.WorldAddr.All(), d.top.Excluded.All()...)
	for _, a := range addrs {
		for _, start := range []func(*lab.NS, netip.AddrPort) (*lab.Server, error){lab.EchoTCP, lab.EchoUDP} {
			s, err := start(d.top.World, port(a))
			if err != nil {
				return fmt.Errorf("start a server on %s: %w", a, err)
			}
			d.servers = append(d.servers, s)
		}
	}
	return nil
}

// expect sends TCP, UDP and ICMP from the pod and compares what the server saw.
func (d *demo) expect(ctx context.Context, dst, want netip.Addr) error {
	pod := d.top.Pods[0]
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	seen, conn, err := lab.AskTCP(ctx, pod, netip.AddrPort{}, port(dst))
	if err != nil {
		return fmt.Errorf("TCP to %s: %w", dst, err)
	}
	conn.Close()
	if err := d.report("TCP", dst, seen.Addr(), want); err != nil {
		return err
	}
	seen, err = lab.AskUDP(ctx, pod, netip.AddrPort{}, port(dst), []byte("hello"))
	if err != nil {
		return fmt.Errorf("UDP to %s: %w", dst, err)
	}
	if err := d.report("UDP", dst, seen.Addr(), want); err != nil {
		return err
	}
	source, err := d.ping(ctx, dst)
	if err != nil {
		return fmt.Errorf("ICMP to %s: %w", dst, err)
	}
	return d.report("ICMP", dst, source, want)
}

func (d *demo) report(proto string, dst, seen, want netip.Addr) error {
	verdict := "masqueraded"
	if d.top.PodAddrs[0].Of(dst) == seen {
		verdict = "not masqueraded (excluded)"
	}
	d.printf("  %-4s pod -> %-18s seen as %-16s %s\n", proto, dst, seen, verdict)
	if seen != want {
		return fmt.Errorf("%s to %s: the server saw %s, expected %s", proto, dst, seen, want)
	}
	return nil
}

// ping sends an echo request and returns its source as a capture at the server saw it.
func (d *demo) ping(ctx context.Context, dst netip.Addr) (netip.Addr, error) {
	capture, err := lab.StartCapture(d.top.World, "eth0", lab.CaptureOptions{Incoming: true})
	if err != nil {
		return netip.Addr{}, err
	}
	defer capture.Stop()
	if _, err := lab.Ping(ctx, d.top.Pods[0], dst, 4242, 1, 32); err != nil {
		return netip.Addr{}, err
	}
	for _, p := range capture.Packets() {
		f, ok := lab.ParseFrame(p.Data)
		if !ok || f.Dst != dst {
			continue
		}
		if typ, _, _, ok := f.ICMP(); ok && (typ == 8 || typ == 128) {
			return f.Src, nil
		}
	}
	return netip.Addr{}, errors.New("the request was answered but not captured")
}

// expectList shows the list in the kernel and compares it.
func (d *demo) expectList(ctx context.Context, want []string) error {
	out, err := d.show(ctx, 0, "bpf", "ipmasq", "list")
	if err != nil {
		return err
	}
	for _, p := range append(want, "169.254.0.0/16", "fe80::/10") {
		if !strings.Contains(out, p+"\n") {
			return fmt.Errorf("bpf ipmasq list: %s is missing", p)
		}
	}
	return nil
}
