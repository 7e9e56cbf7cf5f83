package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"bauta.dev/bauta/internal/lab"
)

// API is a client of the API server for reading, which is too slow with a process
// for each question. What users do, tests do with kubectl and helm.
type API struct {
	ns    *lab.NS
	creds *credentials
	once  sync.Mutex
	http  *http.Client
}

func newAPI(ns *lab.NS, creds *credentials) *API { return &API{ns: ns, creds: creds} }

// client waits for the certificate that the API server makes for itself.
func (a *API) client() (*http.Client, error) {
	a.once.Lock()
	defer a.once.Unlock()
	if a.http != nil {
		return a.http, nil
	}
	text, err := os.ReadFile(a.creds.authority())
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return nil, errors.New("api server's certificate: not complete yet")
	}
	a.http = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return lab.DialTCP(ctx, a.ns, netip.AddrPort{}, netip.AddrPortFrom(plane.V4, apiPort))
		},
	}}
	return a.http, nil
}

// StatusError is an answer of the API server that is no success.
type StatusError struct {
	Code int
	Text string
}

func (e *StatusError) Error() string { return fmt.Sprintf("%d: %s", e.Code, e.Text) }

// NotFound says whether an error is that an object does not exist.
func NotFound(err error) bool {
	var e *StatusError
	return errors.As(err, &e) && e.Code == http.StatusNotFound
}

// Get reads a path into out, which may be nil.
func (a *API) Get(ctx context.Context, path string, out any) error {
	return a.do(ctx, http.MethodGet, path, "", nil, out)
}

// Post creates an object.
func (a *API) Post(ctx context.Context, path string, in any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	return a.do(ctx, http.MethodPost, path, "application/json", body, nil)
}

// Merge changes an object by a JSON merge patch.
func (a *API) Merge(ctx context.Context, path string, patch any) error {
	body, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	return a.do(ctx, http.MethodPatch, path, "application/merge-patch+json", body, nil)
}

// Delete deletes an object; one that is gone already is no error.
func (a *API) Delete(ctx context.Context, path string) error {
	if err := a.do(ctx, http.MethodDelete, path, "", nil, nil); !NotFound(err) {
		return err
	}
	return nil
}

func (a *API) do(ctx context.Context, method, path, kind string, body []byte, out any) error {
	client, err := a.client()
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("https://%s:%d%s", plane.V4, apiPort, path), bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Authorization", "Bearer "+a.creds.tokens[admin])
	if kind != "" {
		r.Header.Set("Content-Type", kind)
	}
	resp, err := client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %w", method, path, &StatusError{resp.StatusCode, strings.TrimSpace(string(answer))})
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer, out)
}
