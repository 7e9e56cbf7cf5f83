package cluster

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"bauta.dev/bauta/internal/lab"
)

// controlPlane is etcd, the API server, the controllers and the scheduler.
type controlPlane struct {
	ns    *lab.NS
	dir   string
	kube  string
	creds *credentials
	parts []*process
}

func startControlPlane(ctx context.Context, kube, dir string, f *Fabric) (*controlPlane, error) {
	ns, err := lab.NewNS("")
	if err != nil {
		return nil, err
	}
	p := &controlPlane{ns: ns, dir: dir, kube: kube}
	if err := p.start(ctx, f); err != nil {
		return nil, errors.Join(fmt.Errorf("control plane: %w", err), p.close())
	}
	return p, nil
}

func (p *controlPlane) start(ctx context.Context, f *Fabric) (err error) {
	if err := f.attach(p.ns, plane); err != nil {
		return err
	}
	if p.creds, err = newCredentials(p.dir); err != nil {
		return err
	}
	if err := p.run("etcd", "--data-dir", "etcd", "--unsafe-no-fsync", "--log-level", "warn"); err != nil {
		return err
	}
	services := fmt.Sprintf("--service-cluster-ip-range=%s,%s", ServiceRange4, ServiceRange6)
	if err := p.run("kube-apiserver",
		"--etcd-servers=http://127.0.0.1:2379", "--cert-dir=pki",
		"--advertise-address="+plane.V4.String(), fmt.Sprintf("--secure-port=%d", apiPort), services,
		"--token-auth-file="+p.creds.tokensFile(), "--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+p.creds.accountKey(), "--service-account-signing-key-file="+p.creds.accountKey(),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--kubelet-preferred-address-types=InternalIP",
	); err != nil {
		return err
	}
	a := p.api()
	if err := p.await(ctx, func() error { return a.Get(ctx, "/readyz", nil) }); err != nil {
		return err
	}
	if err := p.runClient("kube-controller-manager",
		"--service-account-private-key-file="+p.creds.accountKey(), "--root-ca-file="+p.creds.authority(),
		"--use-service-account-credentials", services,
		"--allocate-node-cidrs", fmt.Sprintf("--cluster-cidr=%s,%s", PodRange4, PodRange6),
		"--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=64",
		// A node that is gone is noticed within a test's patience.
		"--node-monitor-period=1s", "--node-monitor-grace-period=12s",
	); err != nil {
		return err
	}
	if err := p.runClient("kube-scheduler"); err != nil {
		return err
	}
	// Pods can't be made before the controllers made the account they run as.
	return p.await(ctx, func() error { return a.Get(ctx, "/api/v1/namespaces/default/serviceaccounts/default", nil) })
}

// runClient runs a component that talks to the API server with its own identity.
func (p *controlPlane) runClient(name string, args ...string) error {
	config, err := p.creds.kubeconfig("system:" + name)
	if err != nil {
		return err
	}
	return p.run(name, append(args, "--leader-elect=false", "--kubeconfig="+config,
		"--authentication-kubeconfig="+config, "--authorization-kubeconfig="+config)...)
}

func (p *controlPlane) run(name string, args ...string) error {
	cmd := exec.Command(p.kube, append([]string{name}, args...)...)
	cmd.Dir = p.dir
	part, err := start(p.ns, p.dir, name, cmd)
	if err == nil {
		p.parts = append(p.parts, part)
	}
	return err
}

// await polls until cond returns nil, a component ends, or the time is up.
func (p *controlPlane) await(ctx context.Context, cond func() error) error {
	return poll(ctx, time.Minute, func() error {
		for _, part := range p.parts {
			if part.ended() {
				return stop{fmt.Errorf("%s ended:\n%s", part.name, tail(p.log(part.name), 15))}
			}
		}
		return cond()
	})
}

func (p *controlPlane) log(name string) string { return p.dir + "/" + name + ".log" }

func (p *controlPlane) api() *API { return newAPI(p.ns, p.creds) }

func (p *controlPlane) close() error {
	var errs []error
	for i := len(p.parts) - 1; i >= 0; i-- {
		errs = append(errs, p.parts[i].kill())
	}
	p.parts = nil
	return errors.Join(append(errs, p.ns.Close())...)
}

// stop is an error that waiting does not mend.
type stop struct{ error }

// poll asks until cond returns nil. The error is the last one it returned.
func poll(ctx context.Context, limit time.Duration, cond func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	every := time.NewTicker(50 * time.Millisecond)
	defer every.Stop()
	for {
		err := cond()
		var final stop
		if err == nil || errors.As(err, &final) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (limit %s): %w", ctx.Err(), limit, err)
		case <-every.C:
		}
	}
}
